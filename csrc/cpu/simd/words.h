// Vectors of 32-bit words whose bit fields become numbers.
#pragma once

#include "cpu/simd/simd.h"

namespace effops::cpu::EFFOPS_ISA {

#if defined(EFFOPS_ISA_AVX512)
struct Words {
  __m512i v;
  static Words load(const void* p) { return {_mm512_loadu_si512(p)}; }
  Words upper_half() const { return {_mm512_srli_epi32(v, 16)}; }
  // The bits of `mask` as an integer below 2^31.
  Vec masked(int32_t mask) const { return {_mm512_cvtepi32_ps(_mm512_and_si512(v, _mm512_set1_epi32(mask)))}; }
};
#elif defined(EFFOPS_ISA_AVX2)
struct Words {
  __m256i v;
  static Words load(const void* p) { return {_mm256_loadu_si256(static_cast<const __m256i*>(p))}; }
  Words upper_half() const { return {_mm256_srli_epi32(v, 16)}; }
  Vec masked(int32_t mask) const { return {_mm256_cvtepi32_ps(_mm256_and_si256(v, _mm256_set1_epi32(mask)))}; }
};
#else
struct Words {
  typedef uint32_t native __attribute__((vector_size(Vec::width * sizeof(uint32_t))));
  native v;
  static Words load(const void* p) {
    Words w;
    std::memcpy(&w.v, p, sizeof w.v);
    return w;
  }
  Words upper_half() const { return {v >> 16}; }
  Vec masked(int32_t mask) const { return {__builtin_convertvector(v & static_cast<uint32_t>(mask), Vec::native)}; }
};
#endif

}  // namespace effops::cpu::EFFOPS_ISA
