// Dot products of bytes with 4-bit numbers, and the comparison of many short integers: exact on every instruction set.
#pragma once

#include <cstdint>

#if defined(EFFOPS_ISA_AVX2) || defined(EFFOPS_ISA_AVX512)
#include <immintrin.h>
#endif

namespace effops::cpu::EFFOPS_ISA {

inline constexpr int kNibbleTokens = 16;  // of a step

#if defined(EFFOPS_ISA_AVX2) || defined(EFFOPS_ISA_AVX512)

// Sixteen 32-bit words as the low and the high nibbles of their bytes.
struct Nibbles {
  __m256i low[2], high[2];

  explicit Nibbles(const int32_t* words) {
    const __m256i mask = _mm256_set1_epi8(15);
    for (int i = 0; i < 2; ++i) {
      const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(words + 8 * i));
      low[i] = _mm256_and_si256(x, mask);
      high[i] = _mm256_and_si256(_mm256_srli_epi16(x, 4), mask);
    }
  }
};

// A word's low nibbles times four bytes, and its high ones times four others; at most 16 bits.
struct Sums16 {
  __m256i v;  // sixteen tokens

  static Sums16 of(const Nibbles& x, int32_t low, int32_t high, int16_t less) {
    const __m256i a = _mm256_set1_epi32(low), b = _mm256_set1_epi32(high);
    __m256i sum[2];
    for (int i = 0; i < 2; ++i)
      sum[i] = _mm256_add_epi16(_mm256_maddubs_epi16(x.low[i], a), _mm256_maddubs_epi16(x.high[i], b));
    const __m256i both = _mm256_permute4x64_epi64(_mm256_hadd_epi16(sum[0], sum[1]), 0xd8);
    return {_mm256_sub_epi16(both, _mm256_set1_epi16(less))};
  }
  static Sums16 load(const int16_t* p) { return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))}; }
  void store(int16_t* p) const { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v); }
  friend Sums16 max_of_sums(Sums16 a, Sums16 b) { return {_mm256_max_epi16(a.v, b.v)}; }
};

// The same over several words. kHigh: what a high nibble counts more than a low one.
struct Sums32 {
  __m256i v[2];

  static Sums32 all(int32_t x) { return {{_mm256_set1_epi32(x), _mm256_set1_epi32(x)}}; }
  template <int kHigh>
  void add(const Nibbles& x, int32_t low, int32_t high) {
    const __m256i a = _mm256_set1_epi32(low), b = _mm256_set1_epi32(high), one = _mm256_set1_epi16(1);
    for (int i = 0; i < 2; ++i) {
      const __m256i s = _mm256_maddubs_epi16(x.low[i], a), t = _mm256_maddubs_epi16(x.high[i], b);
      v[i] = _mm256_add_epi32(v[i], kHigh == 1 ? _mm256_madd_epi16(_mm256_add_epi16(s, t), one)
                                               : _mm256_add_epi32(_mm256_madd_epi16(s, one),
                                                                  _mm256_madd_epi16(t, _mm256_set1_epi16(kHigh))));
    }
  }
  static Sums32 load(const int32_t* p) {
    const auto* q = reinterpret_cast<const __m256i*>(p);
    return {{_mm256_loadu_si256(q), _mm256_loadu_si256(q + 1)}};
  }
  void store(int32_t* p) const {
    for (int i = 0; i < 2; ++i) _mm256_storeu_si256(reinterpret_cast<__m256i*>(p) + i, v[i]);
  }
  friend Sums32 max_of_sums(Sums32 a, Sums32 b) {
    return {{_mm256_max_epi32(a.v[0], b.v[0]), _mm256_max_epi32(a.v[1], b.v[1])}};
  }
};

// Bit i: x[i] >= at, of 32.
inline uint32_t at_least(const int16_t* x, int16_t at) {
  const __m256i* const p = reinterpret_cast<const __m256i*>(x);
  const __m256i limit = _mm256_set1_epi16(at);
  __m256i less[2];
  for (int i = 0; i < 2; ++i) less[i] = _mm256_cmpgt_epi16(limit, _mm256_loadu_si256(p + i));
  const __m256i bytes = _mm256_permute4x64_epi64(_mm256_packs_epi16(less[0], less[1]), 0xd8);
  return ~static_cast<uint32_t>(_mm256_movemask_epi8(bytes));
}

#else

struct Nibbles {
  const int32_t* words;
  explicit Nibbles(const int32_t* w) : words(w) {}

  // Of token i.
  void dot(int i, int32_t low, int32_t high, int32_t& a, int32_t& b) const {
    a = b = 0;
    for (int j = 0; j < 32; j += 8) {
      a += (words[i] >> j & 15) * static_cast<int8_t>(low >> j);
      b += (words[i] >> (j + 4) & 15) * static_cast<int8_t>(high >> j);
    }
  }
};

template <class Self, class T>
struct Sums {
  T v[kNibbleTokens];

  static Self load(const T* p) {
    Self s;
    for (int i = 0; i < kNibbleTokens; ++i) s.v[i] = p[i];
    return s;
  }
  void store(T* p) const {
    for (int i = 0; i < kNibbleTokens; ++i) p[i] = v[i];
  }
  friend Self max_of_sums(Self a, const Self& b) {
    for (int i = 0; i < kNibbleTokens; ++i) a.v[i] = a.v[i] < b.v[i] ? b.v[i] : a.v[i];
    return a;
  }
};

struct Sums16 : Sums<Sums16, int16_t> {
  static Sums16 of(const Nibbles& x, int32_t low, int32_t high, int16_t less) {
    Sums16 s;
    for (int i = 0; i < kNibbleTokens; ++i) {
      int32_t a, b;
      x.dot(i, low, high, a, b);
      s.v[i] = static_cast<int16_t>(a + b - less);
    }
    return s;
  }
};

struct Sums32 : Sums<Sums32, int32_t> {
  static Sums32 all(int32_t x) {
    Sums32 s;
    for (int32_t& v : s.v) v = x;
    return s;
  }
  template <int kHigh>
  void add(const Nibbles& x, int32_t low, int32_t high) {
    for (int i = 0; i < kNibbleTokens; ++i) {
      int32_t a, b;
      x.dot(i, low, high, a, b);
      v[i] += a + kHigh * b;
    }
  }
};

inline uint32_t at_least(const int16_t* x, int16_t at) {
  uint32_t mask = 0;
  for (int i = 0; i < 32; ++i) mask |= static_cast<uint32_t>(x[i] >= at) << i;
  return mask;
}

#endif

}  // namespace effops::cpu::EFFOPS_ISA
