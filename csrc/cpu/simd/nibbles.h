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

// Sixteen words as the nibbles of their bytes 0 and 1 and of their bytes 2 and 3, so that products of neighbours add up
// to sums of sixteen bits without an exchange of lanes. Element 2i is of word i, 2i + 1 of word 8 + i.
struct NibblePairs {
  __m256i low[2], high[2];

  explicit NibblePairs(const int32_t* words) {
    const __m256i mask = _mm256_set1_epi8(15);
    const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(words));
    const __m256i y = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(words + 8));
    const __m256i halves[2] = {_mm256_blend_epi16(x, _mm256_slli_epi32(y, 16), 0xaa),
                               _mm256_blend_epi16(_mm256_srli_epi32(x, 16), y, 0xaa)};
    for (int i = 0; i < 2; ++i) {
      low[i] = _mm256_and_si256(halves[i], mask);
      high[i] = _mm256_and_si256(_mm256_srli_epi16(halves[i], 4), mask);
    }
  }
};

// A word's low nibbles times four bytes, and its high ones times four others, less a number; at most 16 bits.
struct Sums16 {
  struct Query {
    __m256i low[2], high[2], less;

    Query(int32_t low_bytes, int32_t high_bytes, int16_t less_by) : less(_mm256_set1_epi16(less_by)) {
      for (int i = 0; i < 2; ++i) {
        low[i] = _mm256_set1_epi16(static_cast<int16_t>(low_bytes >> 16 * i));
        high[i] = _mm256_set1_epi16(static_cast<int16_t>(high_bytes >> 16 * i));
      }
    }
  };

  __m256i v;  // sixteen tokens in the order of NibblePairs

  static Sums16 of(const NibblePairs& x, const Query& q) {
    const __m256i first =
        _mm256_add_epi16(_mm256_maddubs_epi16(x.low[0], q.low[0]), _mm256_maddubs_epi16(x.high[0], q.high[0]));
    const __m256i second =
        _mm256_add_epi16(_mm256_maddubs_epi16(x.low[1], q.low[1]), _mm256_maddubs_epi16(x.high[1], q.high[1]));
    return {_mm256_sub_epi16(_mm256_add_epi16(first, second), q.less)};
  }
  void store(int16_t* p) const {
    const __m256i evens_first = _mm256_set_epi8(15, 14, 11, 10, 7, 6, 3, 2, 13, 12, 9, 8, 5, 4, 1, 0,  //
                                                15, 14, 11, 10, 7, 6, 3, 2, 13, 12, 9, 8, 5, 4, 1, 0);
    const __m256i x = _mm256_permute4x64_epi64(_mm256_shuffle_epi8(v, evens_first), 0xd8);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x);
  }
  static Sums16 load(const int16_t* p) {
    const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    const __m256i halves = _mm256_permute4x64_epi64(x, 0xd8);  // 0-3 and 8-11, then 4-7 and 12-15
    return {_mm256_unpacklo_epi16(halves, _mm256_unpackhi_epi64(halves, halves))};
  }
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

// Bit i: x[i] > at, and x[i] == at, of 64.
struct Compared {
  uint64_t above = 0, equal = 0;

  Compared(const int16_t* x, int16_t at) {
    const __m256i limit = _mm256_set1_epi16(at);
    for (int half = 0; half < 2; ++half) {
      const __m256i* const p = reinterpret_cast<const __m256i*>(x + 32 * half);
      const __m256i a = _mm256_loadu_si256(p), b = _mm256_loadu_si256(p + 1);
      above |= bits_of(_mm256_cmpgt_epi16(a, limit), _mm256_cmpgt_epi16(b, limit)) << 32 * half;
      equal |= bits_of(_mm256_cmpeq_epi16(a, limit), _mm256_cmpeq_epi16(b, limit)) << 32 * half;
    }
  }

 private:
  static uint64_t bits_of(__m256i a, __m256i b) {
    const __m256i bytes = _mm256_permute4x64_epi64(_mm256_packs_epi16(a, b), 0xd8);
    return static_cast<uint32_t>(_mm256_movemask_epi8(bytes));
  }
};

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

using NibblePairs = Nibbles;

struct Sums16 : Sums<Sums16, int16_t> {
  struct Query {
    int32_t low, high;
    int16_t less;
  };

  static Sums16 of(const NibblePairs& x, const Query& q) {
    Sums16 s;
    for (int i = 0; i < kNibbleTokens; ++i) {
      int32_t a, b;
      x.dot(i, q.low, q.high, a, b);
      s.v[i] = static_cast<int16_t>(a + b - q.less);
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

struct Compared {
  uint64_t above = 0, equal = 0;

  Compared(const int16_t* x, int16_t at) {
    for (int i = 0; i < 64; ++i) {
      above |= static_cast<uint64_t>(x[i] > at) << i;
      equal |= static_cast<uint64_t>(x[i] == at) << i;
    }
  }
};

#endif

}  // namespace effops::cpu::EFFOPS_ISA
