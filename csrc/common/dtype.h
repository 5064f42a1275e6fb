// Element types that cross the wall between torch and the kernels.
#pragma once

#include <cstddef>
#include <cstdint>

namespace effops {

// Storage only: arithmetic goes through the SIMD vocabulary or the scalar conversions below.
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

enum class DType : int8_t { f32, bf16, f16, f64 };

constexpr size_t size_of(DType t) { return t == DType::f64 ? 8 : t == DType::f32 ? 4 : 2; }

// What kernels compute in.
constexpr DType compute_type(DType t) { return t == DType::f64 ? DType::f64 : DType::f32; }

constexpr const char* name_of(DType t) {
  switch (t) {
    case DType::f32:
      return "float32";
    case DType::bf16:
      return "bfloat16";
    case DType::f16:
      return "float16";
    case DType::f64:
      return "float64";
  }
  return "?";
}

}  // namespace effops
