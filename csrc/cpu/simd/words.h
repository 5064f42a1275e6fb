// Vectors of 32-bit words whose bit fields become numbers, or factors of integer products: dot_halves of two 16-bit
// numbers with signs each, dot_bytes of four without signs (to 15 unless kWholeBytes) with four with them. With kPairs
// also of products of two bfloat16.
#pragma once

#include "cpu/simd/simd.h"

namespace effops::cpu::EFFOPS_ISA {

#if defined(EFFOPS_ISA_AVX512)
struct Words {
  __m512i v;
  static Words load(const void* p) { return {_mm512_loadu_si512(p)}; }
  Words right(int bits) const { return {_mm512_srli_epi32(v, bits)}; }
  Words left(int bits) const { return {_mm512_slli_epi32(v, bits)}; }
  Words sign_right(int bits) const { return {_mm512_srai_epi32(v, bits)}; }
  Words operator&(uint32_t mask) const { return {_mm512_and_si512(v, _mm512_set1_epi32(static_cast<int>(mask)))}; }
  Words operator|(Words other) const { return {_mm512_or_si512(v, other.v)}; }
  Words operator+(uint32_t x) const { return {_mm512_add_epi32(v, _mm512_set1_epi32(static_cast<int>(x)))}; }
  Vec numbers() const { return {_mm512_cvtepi32_ps(v)}; }  // integers below 2^31
  Vec floats() const { return {_mm512_castsi512_ps(v)}; }
  static Words of(Vec x) { return {_mm512_castps_si512(x.v)}; }
  static Words set1(int32_t x) { return {_mm512_set1_epi32(x)}; }
  friend Words operator+(Words a, Words b) { return {_mm512_add_epi32(a.v, b.v)}; }
  friend Words operator-(Words a, Words b) { return {_mm512_sub_epi32(a.v, b.v)}; }
  friend Words operator*(Words a, Words b) { return {_mm512_mullo_epi32(a.v, b.v)}; }
  friend Words dot_halves(Words acc, Words a, Words b) { return acc + Words{_mm512_madd_epi16(a.v, b.v)}; }
#if defined(__AVX512VNNI__)
  static constexpr bool kWholeBytes = true;
  friend Words dot_bytes(Words acc, Words a, Words b) { return {_mm512_dpbusd_epi32(acc.v, a.v, b.v)}; }
#else
  static constexpr bool kWholeBytes = false;
  friend Words dot_bytes(Words acc, Words a, Words b) {
    return acc + Words{_mm512_madd_epi16(_mm512_maddubs_epi16(a.v, b.v), _mm512_set1_epi16(1))};
  }
#endif
#if defined(__AVX512BF16__)
  static constexpr bool kPairs = true;
  friend Vec dot_pairs(Vec acc, Words a, Words b) { return {_mm512_dpbf16_ps(acc.v, (__m512bh)a.v, (__m512bh)b.v)}; }
  // The lowest four bits of each half as a bfloat16, whatever the others are: a fifth one chooses between equal halves.
  Words small_numbers() const {
    const __m256i sixteen = _mm256_setr_epi16(0, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0, 0x4100, 0x4110,
                                              0x4120, 0x4130, 0x4140, 0x4150, 0x4160, 0x4170);
    return {_mm512_permutexvar_epi16(v, _mm512_broadcast_i64x4(sixteen))};
  }
#else
  static constexpr bool kPairs = false;
#endif
};
#elif defined(EFFOPS_ISA_AVX2)
struct Words {
  __m256i v;
  static Words load(const void* p) { return {_mm256_loadu_si256(static_cast<const __m256i*>(p))}; }
  Words right(int bits) const { return {_mm256_srli_epi32(v, bits)}; }
  Words left(int bits) const { return {_mm256_slli_epi32(v, bits)}; }
  Words sign_right(int bits) const { return {_mm256_srai_epi32(v, bits)}; }
  Words operator&(uint32_t mask) const { return {_mm256_and_si256(v, _mm256_set1_epi32(static_cast<int>(mask)))}; }
  Words operator|(Words other) const { return {_mm256_or_si256(v, other.v)}; }
  Words operator+(uint32_t x) const { return {_mm256_add_epi32(v, _mm256_set1_epi32(static_cast<int>(x)))}; }
  Vec numbers() const { return {_mm256_cvtepi32_ps(v)}; }
  Vec floats() const { return {_mm256_castsi256_ps(v)}; }
  static constexpr bool kPairs = false;
  static Words of(Vec x) { return {_mm256_castps_si256(x.v)}; }
  static Words set1(int32_t x) { return {_mm256_set1_epi32(x)}; }
  friend Words operator+(Words a, Words b) { return {_mm256_add_epi32(a.v, b.v)}; }
  friend Words operator-(Words a, Words b) { return {_mm256_sub_epi32(a.v, b.v)}; }
  friend Words operator*(Words a, Words b) { return {_mm256_mullo_epi32(a.v, b.v)}; }
  static constexpr bool kWholeBytes = false;
  friend Words dot_halves(Words acc, Words a, Words b) { return acc + Words{_mm256_madd_epi16(a.v, b.v)}; }
  friend Words dot_bytes(Words acc, Words a, Words b) {
    return acc + Words{_mm256_madd_epi16(_mm256_maddubs_epi16(a.v, b.v), _mm256_set1_epi16(1))};
  }
};
#else
struct Words {
  typedef uint32_t native __attribute__((vector_size(Vec::width * sizeof(uint32_t))));
  typedef int32_t signed_native __attribute__((vector_size(Vec::width * sizeof(int32_t))));
  native v;
  static Words load(const void* p) {
    Words w;
    std::memcpy(&w.v, p, sizeof w.v);
    return w;
  }
  Words right(int bits) const { return {v >> static_cast<uint32_t>(bits)}; }
  Words left(int bits) const { return {v << static_cast<uint32_t>(bits)}; }
  Words sign_right(int bits) const { return {(native)((signed_native)v >> bits)}; }
  Words operator&(uint32_t mask) const { return {v & mask}; }
  Words operator|(Words other) const { return {v | other.v}; }
  Words operator+(uint32_t x) const { return {v + x}; }
  Vec numbers() const { return {__builtin_convertvector((signed_native)v, Vec::native)}; }
  Vec floats() const { return {(Vec::native)v}; }
  static constexpr bool kPairs = false;
  static Words of(Vec x) { return {(native)x.v}; }
  static Words set1(int32_t x) { return {native{} + static_cast<uint32_t>(x)}; }
  friend Words operator+(Words a, Words b) { return {a.v + b.v}; }
  friend Words operator-(Words a, Words b) { return {a.v - b.v}; }
  friend Words operator*(Words a, Words b) { return {a.v * b.v}; }
  static constexpr bool kWholeBytes = true;
  friend Words dot_halves(Words acc, Words a, Words b) {
    for (int i = 0; i < 2; ++i) acc = acc + a.left(16 - 16 * i).sign_right(16) * b.left(16 - 16 * i).sign_right(16);
    return acc;
  }
  friend Words dot_bytes(Words acc, Words a, Words b) {
    for (int i = 0; i < 4; ++i) acc = acc + (a.right(8 * i) & 255) * b.left(24 - 8 * i).sign_right(24);
    return acc;
  }
};
#endif

// Byte i of each word as a float8 e4m3: its exponent and mantissa are moved to their places in a float32. One without
// an exponent, m / 8 * 2^-6, comes out as g = (1 + m / 8) * 2^-7: 2 g - 2^-6 is right, and larger for all others.
inline Vec e4m3_of(Words words, int i) {
  const Words placed = (i == 3 ? words : words.left(24 - 8 * i)).sign_right(4);
  const Vec g = ((placed & 0x07f00000) + (120u << 23)).floats();
  const Vec size = min(g, fmadd(g, Vec::set1(2), Vec::set1(-1.0f / 64)));
  return (Words::of(size) | (placed & 0x80000000)).floats();
}

}  // namespace effops::cpu::EFFOPS_ISA
