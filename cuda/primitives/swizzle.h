// Where the 16-byte chunks of a tile's rows lie in shared memory, so that the same chunk of eight successive rows falls
// on eight different groups of banks: ldmatrix then reads, and row-wise copies write, without conflicts.
#pragma once

#include "primitives/platform.h"

namespace effops::device {

// Rows of kChunks chunks, back to back. A row's start alone moves by kChunks modulo 8 from row to row; the XOR of
// kSpread values adds what that lacks.
template <int kChunks>
struct Swizzle {
  static constexpr int kSpread = kChunks % 8 == 0 ? 8 : kChunks % 4 == 0 ? 4 : kChunks % 2 == 0 ? 2 : 1;
  static constexpr int kRowBytes = kChunks * 16;

  // In bytes from the tile's beginning.
  __device__ static int offset(int row, int chunk) {
    return row * kRowBytes + ((chunk ^ (row / (8 / kSpread) & (kSpread - 1))) * 16);
  }
};

}  // namespace effops::device
