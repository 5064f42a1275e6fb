// Vectors of 32-bit words whose bit fields become numbers.
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
  static Words of(Vec x) { return {_mm256_castps_si256(x.v)}; }
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
  static Words of(Vec x) { return {(native)x.v}; }
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
