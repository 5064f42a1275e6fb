// How loops find row j of a tile: at a stride, or through a list of pointers.
#pragma once

#include <cstdint>

#include "cpu/simd/simd.h"

namespace effops::cpu::EFFOPS_ISA {

template <class T>
struct StridedRows {
  const T* data;
  int64_t stride;  // elements between rows

  const T* operator[](int64_t j) const { return data + j * stride; }
};

template <class T>
struct ListedRows {
  const T* const* list;

  const T* operator[](int64_t j) const { return list[j]; }
};

}  // namespace effops::cpu::EFFOPS_ISA
