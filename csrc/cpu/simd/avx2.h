// The vocabulary on AVX2 + FMA + F16C: eight float32 lanes.
#pragma once

#include <immintrin.h>

#include <cstring>

#include "common/dtype.h"

namespace effops::cpu::EFFOPS_ISA {

struct Avx2Vec {
  using scalar = float;
  static constexpr int width = 8;
  __m256 v;

  static Avx2Vec set1(float x) { return {_mm256_set1_ps(x)}; }
  static Avx2Vec zero() { return {_mm256_setzero_ps()}; }
  static Avx2Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
  static Avx2Vec load(const bf16* p) {
    const __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16))};
  }
  static Avx2Vec load(const int8_t* p) {
    return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))))};
  }
  static Avx2Vec load(const f16* p) { return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))}; }
  // The first n <= width elements, the rest zero; nothing beyond them is read.
  template <class T>
  static Avx2Vec load_n(const T* p, int n) {
    T padded[8] = {};
    std::memcpy(padded, p, n * sizeof(T));
    return load(padded);
  }
  void store(float* p) const { _mm256_storeu_ps(p, v); }
  void store(bf16* p) const {
    const __m256i u = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7fff)), odd);
    const __m256i quiet = _mm256_or_si256(u, _mm256_set1_epi32(0x400000));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const __m256i high = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                     _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1)));
  }
  void store(f16* p) const {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }

  friend Avx2Vec operator+(Avx2Vec a, Avx2Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
  friend Avx2Vec operator-(Avx2Vec a, Avx2Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
  friend Avx2Vec operator*(Avx2Vec a, Avx2Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
  friend Avx2Vec operator/(Avx2Vec a, Avx2Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
  friend Avx2Vec fmadd(Avx2Vec a, Avx2Vec b, Avx2Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
  friend Avx2Vec max(Avx2Vec a, Avx2Vec b) { return {_mm256_max_ps(a.v, b.v)}; }
  friend Avx2Vec min(Avx2Vec a, Avx2Vec b) { return {_mm256_min_ps(a.v, b.v)}; }
  friend Avx2Vec abs(Avx2Vec a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v)}; }
  friend Avx2Vec where_less(Avx2Vec x, Avx2Vec limit, Avx2Vec a, Avx2Vec b) {
    return {_mm256_blendv_ps(b.v, a.v, _mm256_cmp_ps(x.v, limit.v, _CMP_LT_OQ))};
  }
  friend Avx2Vec round(Avx2Vec a) { return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
  friend Avx2Vec pow2(Avx2Vec n) {
    const __m256i e = _mm256_add_epi32(_mm256_cvtps_epi32(n.v), _mm256_set1_epi32(127));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(e, 23))};
  }
  friend float reduce_add(Avx2Vec a) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    s = _mm_add_ss(s, _mm_movehdup_ps(s));
    return _mm_cvtss_f32(s);
  }
  // Row i, lane j becomes row j, lane i.
  static void transpose(Avx2Vec (&a)[8]) {
    __m256 t[8];
    for (int i = 0; i < 8; i += 4) {
      const __m256 lo01 = _mm256_unpacklo_ps(a[i].v, a[i + 1].v), hi01 = _mm256_unpackhi_ps(a[i].v, a[i + 1].v);
      const __m256 lo23 = _mm256_unpacklo_ps(a[i + 2].v, a[i + 3].v);
      const __m256 hi23 = _mm256_unpackhi_ps(a[i + 2].v, a[i + 3].v);
      t[i] = _mm256_shuffle_ps(lo01, lo23, 0x44);
      t[i + 1] = _mm256_shuffle_ps(lo01, lo23, 0xee);
      t[i + 2] = _mm256_shuffle_ps(hi01, hi23, 0x44);
      t[i + 3] = _mm256_shuffle_ps(hi01, hi23, 0xee);
    }
    for (int c = 0; c < 4; ++c) {
      a[c].v = _mm256_permute2f128_ps(t[c], t[c + 4], 0x20);
      a[c + 4].v = _mm256_permute2f128_ps(t[c], t[c + 4], 0x31);
    }
  }
  static Avx2Vec reduce_add_each(const Avx2Vec (&a)[8]) {
    const __m256 ab = _mm256_hadd_ps(a[0].v, a[1].v), cd = _mm256_hadd_ps(a[2].v, a[3].v);
    const __m256 ef = _mm256_hadd_ps(a[4].v, a[5].v), gh = _mm256_hadd_ps(a[6].v, a[7].v);
    const __m256 abcd = _mm256_hadd_ps(ab, cd), efgh = _mm256_hadd_ps(ef, gh);
    return {_mm256_add_ps(_mm256_permute2f128_ps(abcd, efgh, 0x20), _mm256_permute2f128_ps(abcd, efgh, 0x31))};
  }
  template <int M>
  static Avx2Vec fold_max(Avx2Vec a) {
    if constexpr (M <= 4) a.v = _mm256_max_ps(a.v, _mm256_permute2f128_ps(a.v, a.v, 1));
    if constexpr (M <= 2) a.v = _mm256_max_ps(a.v, _mm256_permute_ps(a.v, 0x4e));
    if constexpr (M <= 1) a.v = _mm256_max_ps(a.v, _mm256_permute_ps(a.v, 0xb1));
    return a;
  }
  template <int M>
  static Avx2Vec fold_add(Avx2Vec a) {
    if constexpr (M <= 4) a.v = _mm256_add_ps(a.v, _mm256_permute2f128_ps(a.v, a.v, 1));
    if constexpr (M <= 2) a.v = _mm256_add_ps(a.v, _mm256_permute_ps(a.v, 0x4e));
    if constexpr (M <= 1) a.v = _mm256_add_ps(a.v, _mm256_permute_ps(a.v, 0xb1));
    return a;
  }

  // Sixteen bfloat16 as their even and odd elements: one operation a half, no widening shuffle.
  static void split(const bf16* p, Avx2Vec& even, Avx2Vec& odd) {
    const __m256i u = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    even.v = _mm256_castsi256_ps(_mm256_slli_epi32(u, 16));
    odd.v = _mm256_castsi256_ps(_mm256_and_si256(u, _mm256_set1_epi32(int(0xffff0000))));
  }
  static void split(const int8_t* p, Avx2Vec& even, Avx2Vec& odd) {
    const __m256i u = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    even.v = _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(u, 16), 16));
    odd.v = _mm256_cvtepi32_ps(_mm256_srai_epi32(u, 16));
  }
  // Undoes split's order.
  static void unsplit(Avx2Vec& even, Avx2Vec& odd) {
    const __m256 low = _mm256_unpacklo_ps(even.v, odd.v), high = _mm256_unpackhi_ps(even.v, odd.v);
    even.v = _mm256_permute2f128_ps(low, high, 0x20);
    odd.v = _mm256_permute2f128_ps(low, high, 0x31);
  }
};

}  // namespace effops::cpu::EFFOPS_ISA
