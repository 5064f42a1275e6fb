// How the two products of a kernel consume elements of type T. There are two ways: widen to the
// compute type and fuse multiply-add, or feed bfloat16 pairs to the dot instruction. Loops are
// written once over this vocabulary.
//
// A chunk is 2 * width consecutive elements of a row. Its two accumulators hold the columns of a
// chunk in "kernel order"; restore() brings them back to memory order.
// A unit is what a GEMM broadcasts: one compute element, or a bfloat16 pair.
#pragma once

#include <type_traits>

#include "cpu/simd/simd.h"

namespace effops::cpu::EFFOPS_ISA {

template <class V, class T>
struct FmaProduct {
  using C = typename V::scalar;
  using Element = C;  // queries and probabilities are kept as this
  using Unit = C;
  static constexpr int W = V::width, kChunk = 2 * W, kPack = 1;

  struct Chunk {
    V a, b;
  };
  template <class S>  // T or int8
  static Chunk load(const S* p) {
    return {V::load(p), V::load(p + W)};
  }
  template <class S>
  static Chunk load_n(const S* p, int n) {
    return {V::load_n(p, n < W ? n : W), n > W ? V::load_n(p + W, n - W) : V::zero()};
  }
  static Chunk load_query(const Element* p) { return {V::load(p), V::load(p + W)}; }
  static V dot(V acc, const Chunk& x, const Chunk& y) { return fmadd(x.b, y.b, fmadd(x.a, y.a, acc)); }

  static Element element(T x) { return to_float(x); }
  static void place(const T* from, Element* to) {  // a chunk
    V::load(from).store(to);
    V::load(from + W).store(to + W);
  }

  // A value chunk spans kPack rows.
  static Chunk pack_rows(const Chunk& x, const Chunk&) { return x; }
  static V broadcast(const Unit* p) { return V::set1(*p); }
  static V load_units(const Unit* p) { return V::load(p); }
  static V pair(V x, V) { return x; }
  static V multiply_add(V x, V w, V acc) { return fmadd(x, w, acc); }
  static void restore(V&, V&) {}
  // Probabilities of width / MR keys, [key][MR]: as units, [key / kPack][MR].
  template <int MR>
  static void store_units(V x, Unit* p) {
    x.store(p);
  }
  static void store_elements(V x, Element* p) { x.store(p); }
};

#if defined(EFFOPS_ISA_AVX512) && defined(__AVX512BF16__)

struct Bf16Product {
  using V = Avx512Vec;
  using T = bf16;
  using C = float;
  using Element = bf16;
  using Unit = uint32_t;
  static constexpr int W = 16, kChunk = 32, kPack = 2;

  struct Chunk {
    __m512i a, b;  // b: the upper columns of a packed value chunk
  };
  static Chunk load(const T* p) { return {_mm512_loadu_si512(p), _mm512_setzero_si512()}; }
  static Chunk load_n(const T* p, int n) {  // n < kChunk
    return {_mm512_maskz_loadu_epi16((1u << n) - 1, p), _mm512_setzero_si512()};
  }
  // Integers up to 2^8 are bfloat16 values.
  static V pairs_of(const int8_t* p) {
    const V low = V::load(p), high = V::load(p + W);
    return {(__m512)_mm512_cvtne2ps_pbh(high.v, low.v)};
  }
  static Chunk load(const int8_t* p) { return {(__m512i)pairs_of(p).v, _mm512_setzero_si512()}; }
  static Chunk load_n(const int8_t* p, int n) {  // n < kChunk
    const V low = V::load_n(p, n < W ? n : W), high = n > W ? V::load_n(p + W, n - W) : V::zero();
    return {(__m512i)_mm512_cvtne2ps_pbh(high.v, low.v), _mm512_setzero_si512()};
  }
  static Chunk load_query(const T* p) { return load(p); }
  static V dot(V acc, const Chunk& x, const Chunk& y) { return multiply_add({(__m512)x.a}, {(__m512)y.a}, acc); }

  static Element element(T x) { return x; }
  static void place(const T* from, Element* to) { _mm512_storeu_si512(to, _mm512_loadu_si512(from)); }

  static Chunk pack_rows(const Chunk& x, const Chunk& y) {
    return {_mm512_unpacklo_epi16(x.a, y.a), _mm512_unpackhi_epi16(x.a, y.a)};
  }
  static V broadcast(const Unit* p) { return {(__m512)_mm512_set1_epi32(int(*p))}; }
  static V load_units(const Unit* p) { return {(__m512)_mm512_loadu_si512(p)}; }
  // Of widened bfloat16 values.
  static V pair(V low, V high) {
    const __m512i upper = _mm512_and_si512((__m512i)high.v, _mm512_set1_epi32(int(0xffff0000)));
    return {(__m512)_mm512_or_si512(upper, _mm512_srli_epi32((__m512i)low.v, 16))};
  }
  static V multiply_add(V x, V w, V acc) { return {_mm512_dpbf16_ps(acc.v, (__m512bh)x.v, (__m512bh)w.v)}; }
  static void restore(V& low, V& high) {
    const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512 a = low.v, b = high.v;
    low.v = _mm512_permutex2var_ps(a, first, b);
    high.v = _mm512_permutex2var_ps(a, _mm512_add_epi32(first, _mm512_set1_epi32(8)), b);
  }
  template <int MR>
  static void store_units(V x, Unit* p) {
    // Lanes come as [key][MR]; keys of a pair end up side by side.
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i pair = _mm512_srli_epi32(lane, 1), odd = _mm512_and_si512(lane, _mm512_set1_epi32(1));
    const __m512i row = _mm512_and_si512(pair, _mm512_set1_epi32(MR - 1));
    const __m512i key = _mm512_sub_epi32(pair, row);  // (key pair) * MR
    const __m512i from = _mm512_add_epi32(_mm512_add_epi32(_mm512_slli_epi32(key, 1), row),
                                          _mm512_mullo_epi32(odd, _mm512_set1_epi32(MR)));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh(_mm512_permutexvar_ps(from, x.v)));
  }
  static void store_elements(V x, Element* p) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh(x.v));
  }
};

template <class T>
using product_of = std::conditional_t<std::is_same_v<T, bf16>, Bf16Product, FmaProduct<vec_of<T>, T>>;

#else

template <class T>
using product_of = FmaProduct<vec_of<T>, T>;

#endif

}  // namespace effops::cpu::EFFOPS_ISA
