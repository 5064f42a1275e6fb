// Operands of mma from swizzled tiles of 16-bit elements in shared memory.
#pragma once

#include "primitives/ldmatrix.h"
#include "primitives/platform.h"

namespace effops::device {

// Rows [row, row + 16) of a tile, step of 16 columns: the left operand.
template <class Place>
__device__ void load_left(uint32_t (&to)[4], char* tile, int row, int step) {
  const int lane = lane_index();
  const void* const at[1] = {tile + Place::offset(row + lane % 16, 2 * step + lane / 16)};
  uint32_t four[1][4];
  ldmatrix_x4(four, at);
  EFFOPS_UNROLL
  for (int i = 0; i < 4; ++i) to[i] = four[0][i];
}

// The same of a tile that lies transposed: columns [column, column + 16), step of 16 rows.
template <class Place>
__device__ void load_left_transposed(uint32_t (&to)[4], char* tile, int column, int step) {
  const int lane = lane_index();
  const void* const at[1] = {tile + Place::offset(16 * step + lane % 8 + lane / 16 * 8, column / 8 + lane / 8 % 2)};
  uint32_t four[1][4];
  ldmatrix_x4<true>(four, at);
  EFFOPS_UNROLL
  for (int i = 0; i < 4; ++i) to[i] = four[0][i];
}

// 8 N columns of the right operand from `column` on, step of 16: columns are rows of the tile (kAcross), or its
// columns.
template <class Place, bool kAcross, int N>
__device__ void load_right(uint32_t (&to)[N][2], char* tile, int column, int step) {
  const int lane = lane_index();
  const void* at[N / 2];
  EFFOPS_UNROLL
  for (int n = 0; n < N / 2; ++n)
    at[n] = tile + (kAcross ? Place::offset(column + 16 * n + lane % 8 + lane / 16 * 8, 2 * step + lane / 8 % 2)
                            : Place::offset(16 * step + lane % 16, column / 8 + 2 * n + lane / 16));
  uint32_t four[N / 2][4];
  ldmatrix_x4<!kAcross>(four, at);
  EFFOPS_UNROLL
  for (int n = 0; n < N; ++n) EFFOPS_UNROLL
  for (int i = 0; i < 2; ++i) to[n][i] = four[n / 2][n % 2 * 2 + i];
}

}  // namespace effops::device
