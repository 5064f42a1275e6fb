// The vocabulary on AVX-512 (F, BW, VL, DQ): sixteen float32 lanes.
#pragma once

#include <immintrin.h>

#include "common/dtype.h"

namespace effops::cpu::EFFOPS_ISA {

struct Avx512Vec {
  using scalar = float;
  static constexpr int width = 16;
  __m512 v;

  static Avx512Vec set1(float x) { return {_mm512_set1_ps(x)}; }
  static Avx512Vec zero() { return {_mm512_setzero_ps()}; }
  static Avx512Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static Avx512Vec load(const bf16* p) {
    const __m256i h = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16))};
  }
  static Avx512Vec load(const f16* p) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
  }
  static Avx512Vec load(const int8_t* p) {
    return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
  }
  // The first n <= width elements, the rest zero; nothing beyond them is read.
  static Avx512Vec load_n(const int8_t* p, int n) {
    return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(mask_of(n), p)))};
  }
  static Avx512Vec load_n(const float* p, int n) { return {_mm512_maskz_loadu_ps(mask_of(n), p)}; }
  static Avx512Vec load_n(const bf16* p, int n) {
    const __m256i h = _mm256_maskz_loadu_epi16(mask_of(n), p);
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16))};
  }
  static Avx512Vec load_n(const f16* p, int n) { return {_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask_of(n), p))}; }
  void store(float* p) const { _mm512_storeu_ps(p, v); }
  void store(bf16* p) const {
    const __m512i u = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), odd);
    const __m512i quiet = _mm512_or_si512(u, _mm512_set1_epi32(0x400000));
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    const __m512i high = _mm512_srli_epi32(_mm512_mask_mov_epi32(rounded, nan, quiet), 16);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(high));
  }
  void store(f16* p) const {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }

  friend Avx512Vec operator+(Avx512Vec a, Avx512Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
  friend Avx512Vec operator-(Avx512Vec a, Avx512Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
  friend Avx512Vec operator*(Avx512Vec a, Avx512Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
  friend Avx512Vec operator/(Avx512Vec a, Avx512Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
  friend Avx512Vec fmadd(Avx512Vec a, Avx512Vec b, Avx512Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
  friend Avx512Vec max(Avx512Vec a, Avx512Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
  friend Avx512Vec min(Avx512Vec a, Avx512Vec b) { return {_mm512_min_ps(a.v, b.v)}; }
  friend Avx512Vec abs(Avx512Vec a) { return {_mm512_abs_ps(a.v)}; }
  friend Avx512Vec where_less(Avx512Vec x, Avx512Vec limit, Avx512Vec a, Avx512Vec b) {
    return {_mm512_mask_mov_ps(b.v, _mm512_cmp_ps_mask(x.v, limit.v, _CMP_LT_OQ), a.v)};
  }
  friend Avx512Vec round(Avx512Vec a) {
    return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
  }
  friend Avx512Vec pow2(Avx512Vec n) {
    const __m512i e = _mm512_add_epi32(_mm512_cvtps_epi32(n.v), _mm512_set1_epi32(127));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(e, 23))};
  }
  friend float reduce_add(Avx512Vec a) { return _mm512_reduce_add_ps(a.v); }
  // Row i, lane j becomes row j, lane i.
  static void transpose(Avx512Vec (&a)[16]) {
    __m512 t[16];
    for (int i = 0; i < 16; i += 4) {
      const __m512 lo01 = _mm512_unpacklo_ps(a[i].v, a[i + 1].v), hi01 = _mm512_unpackhi_ps(a[i].v, a[i + 1].v);
      const __m512 lo23 = _mm512_unpacklo_ps(a[i + 2].v, a[i + 3].v);
      const __m512 hi23 = _mm512_unpackhi_ps(a[i + 2].v, a[i + 3].v);
      t[i] = _mm512_shuffle_ps(lo01, lo23, 0x44);
      t[i + 1] = _mm512_shuffle_ps(lo01, lo23, 0xee);
      t[i + 2] = _mm512_shuffle_ps(hi01, hi23, 0x44);
      t[i + 3] = _mm512_shuffle_ps(hi01, hi23, 0xee);
    }
    for (int c = 0; c < 4; ++c) {  // column c of each 4 x 4 block, then the blocks themselves
      const __m512 low02 = _mm512_shuffle_f32x4(t[c], t[c + 4], 0x88),
                   low13 = _mm512_shuffle_f32x4(t[c], t[c + 4], 0xdd);
      const __m512 up02 = _mm512_shuffle_f32x4(t[c + 8], t[c + 12], 0x88);
      const __m512 up13 = _mm512_shuffle_f32x4(t[c + 8], t[c + 12], 0xdd);
      a[c].v = _mm512_shuffle_f32x4(low02, up02, 0x88);
      a[c + 8].v = _mm512_shuffle_f32x4(low02, up02, 0xdd);
      a[c + 4].v = _mm512_shuffle_f32x4(low13, up13, 0x88);
      a[c + 12].v = _mm512_shuffle_f32x4(low13, up13, 0xdd);
    }
  }
  // Lane 4 i + m of vector b becomes lane 4 b + i of vector m.
  static void transpose_4_4(Avx512Vec (&a)[4]) {
    const __m512i within = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    __m512 t[4];
    for (int b = 0; b < 4; ++b) t[b] = _mm512_permutexvar_ps(within, a[b].v);
    const __m512 low01 = _mm512_shuffle_f32x4(t[0], t[1], 0x44), up01 = _mm512_shuffle_f32x4(t[0], t[1], 0xee);
    const __m512 low23 = _mm512_shuffle_f32x4(t[2], t[3], 0x44), up23 = _mm512_shuffle_f32x4(t[2], t[3], 0xee);
    a[0].v = _mm512_shuffle_f32x4(low01, low23, 0x88);
    a[1].v = _mm512_shuffle_f32x4(low01, low23, 0xdd);
    a[2].v = _mm512_shuffle_f32x4(up01, up23, 0x88);
    a[3].v = _mm512_shuffle_f32x4(up01, up23, 0xdd);
  }
  // Lane 8 i + m of vector b becomes lane 2 b + i of vector m.
  static void transpose_2_8(Avx512Vec (&a)[8]) {
    __m512 t[8];  // halves k and k + 8 of the sixteen
    for (int k = 0; k < 8; ++k)
      t[k] = k % 2 == 0 ? _mm512_shuffle_f32x4(a[k / 2].v, a[k / 2 + 4].v, 0x44)
                        : _mm512_shuffle_f32x4(a[k / 2].v, a[k / 2 + 4].v, 0xee);
    __m512 u[8];  // each 128-bit lane transposed over four vectors
    for (int k = 0; k < 8; k += 4) {
      const __m512 lo01 = _mm512_unpacklo_ps(t[k], t[k + 1]), hi01 = _mm512_unpackhi_ps(t[k], t[k + 1]);
      const __m512 lo23 = _mm512_unpacklo_ps(t[k + 2], t[k + 3]), hi23 = _mm512_unpackhi_ps(t[k + 2], t[k + 3]);
      u[k] = _mm512_shuffle_ps(lo01, lo23, 0x44);
      u[k + 1] = _mm512_shuffle_ps(lo01, lo23, 0xee);
      u[k + 2] = _mm512_shuffle_ps(hi01, hi23, 0x44);
      u[k + 3] = _mm512_shuffle_ps(hi01, hi23, 0xee);
    }
    const __m512i even = _mm512_setr_epi64(0, 1, 8, 9, 4, 5, 12, 13),
                  odd = _mm512_setr_epi64(2, 3, 10, 11, 6, 7, 14, 15);
    for (int m = 0; m < 4; ++m) {
      const __m512d low = _mm512_castps_pd(u[m]), high = _mm512_castps_pd(u[m + 4]);
      a[m].v = _mm512_castpd_ps(_mm512_permutex2var_pd(low, even, high));
      a[m + 4].v = _mm512_castpd_ps(_mm512_permutex2var_pd(low, odd, high));
    }
  }
  // A 16 x 16 transposed reduction: each step adds pairs and halves the number of vectors.
  static Avx512Vec reduce_add_each(const Avx512Vec (&a)[16]) {
    __m512 s[8];
    for (int i = 0; i < 8; ++i)
      s[i] =
          _mm512_add_ps(_mm512_unpacklo_ps(a[2 * i].v, a[2 * i + 1].v), _mm512_unpackhi_ps(a[2 * i].v, a[2 * i + 1].v));
    __m512 t[4];
    for (int i = 0; i < 4; ++i)
      t[i] = _mm512_add_ps(_mm512_shuffle_ps(s[2 * i], s[2 * i + 1], 0x44),
                           _mm512_shuffle_ps(s[2 * i], s[2 * i + 1], 0xee));
    __m512 u[2];
    for (int i = 0; i < 2; ++i)
      u[i] = _mm512_add_ps(_mm512_shuffle_f32x4(t[2 * i], t[2 * i + 1], 0x88),
                           _mm512_shuffle_f32x4(t[2 * i], t[2 * i + 1], 0xdd));
    return {_mm512_add_ps(_mm512_shuffle_f32x4(u[0], u[1], 0x88), _mm512_shuffle_f32x4(u[0], u[1], 0xdd))};
  }
  template <int M>
  static Avx512Vec fold_max(Avx512Vec a) {
    if constexpr (M <= 8) a.v = _mm512_max_ps(a.v, _mm512_shuffle_f32x4(a.v, a.v, 0x4e));
    if constexpr (M <= 4) a.v = _mm512_max_ps(a.v, _mm512_shuffle_f32x4(a.v, a.v, 0xb1));
    if constexpr (M <= 2) a.v = _mm512_max_ps(a.v, _mm512_permute_ps(a.v, 0x4e));
    if constexpr (M <= 1) a.v = _mm512_max_ps(a.v, _mm512_permute_ps(a.v, 0xb1));
    return a;
  }
  template <int M>
  static Avx512Vec fold_add(Avx512Vec a) {
    if constexpr (M <= 8) a.v = _mm512_add_ps(a.v, _mm512_shuffle_f32x4(a.v, a.v, 0x4e));
    if constexpr (M <= 4) a.v = _mm512_add_ps(a.v, _mm512_shuffle_f32x4(a.v, a.v, 0xb1));
    if constexpr (M <= 2) a.v = _mm512_add_ps(a.v, _mm512_permute_ps(a.v, 0x4e));
    if constexpr (M <= 1) a.v = _mm512_add_ps(a.v, _mm512_permute_ps(a.v, 0xb1));
    return a;
  }

  static void split(const bf16* p, Avx512Vec& even, Avx512Vec& odd) {
    const __m512i u = _mm512_loadu_si512(p);
    even.v = _mm512_castsi512_ps(_mm512_slli_epi32(u, 16));
    odd.v = _mm512_castsi512_ps(_mm512_and_si512(u, _mm512_set1_epi32(int(0xffff0000))));
  }
  static void split(const int8_t* p, Avx512Vec& even, Avx512Vec& odd) {
    const __m256i u = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    const __m256i low = _mm256_srai_epi16(_mm256_slli_epi16(u, 8), 8), high = _mm256_srai_epi16(u, 8);
    even.v = _mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(low));
    odd.v = _mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(high));
  }
  static void unsplit(Avx512Vec& even, Avx512Vec& odd) {
    const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
    const __m512 e = even.v, o = odd.v;
    even.v = _mm512_permutex2var_ps(e, low, o);
    odd.v = _mm512_permutex2var_ps(e, high, o);
  }

 private:
  static __mmask16 mask_of(int n) { return static_cast<__mmask16>((1u << n) - 1); }
};

}  // namespace effops::cpu::EFFOPS_ISA
