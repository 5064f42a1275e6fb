// Operands of mma from swizzled tiles in shared memory, and scores turned into the operand of the second product.
#pragma once

#include "attention/load.h"
#include "primitives/convert.h"
#include "primitives/ldmatrix.h"
#include "primitives/mma.h"

namespace effops::device {

// Steps of 16 columns that are loaded at once.
template <int kColumns>
inline constexpr int kStepsAtOnce = kColumns % 64 == 0 ? 4 : 2;

// Rows [row, row + 16) of steps [step, step + N): the left operand.
template <class T, int kColumns, int N>
__device__ void load_left(uint32_t (&to)[N][4], char* tile, int row, int step) {
  const int lane = lane_index();
  const void* at[N];
  EFFOPS_UNROLL
  for (int n = 0; n < N; ++n)
    at[n] = tile + Tile<T, kColumns>::Place::offset(row + lane % 16, 2 * (step + n) + lane / 16);
  ldmatrix_x4(to, at);
}

// Rows of the tile are columns of the right operand (keys). to[n] holds steps of 16 elements of sixteen of them, the
// first eight in two registers, the next eight in two. Here: rows [row, row + 16), steps [step, step + N).
template <class T, int kColumns, int N>
__device__ void load_right_steps(uint32_t (&to)[N][4], char* tile, int row, int step) {
  const int lane = lane_index();
  const void* at[N];
  EFFOPS_UNROLL
  for (int n = 0; n < N; ++n)
    at[n] = tile + Tile<T, kColumns>::Place::offset(row + lane % 8 + lane / 16 * 8, 2 * (step + n) + lane / 8 % 2);
  ldmatrix_x4(to, at);
}

// Rows [0, 16 N), one step.
template <class T, int kColumns, int N>
__device__ void load_right_rows(uint32_t (&to)[N][4], char* tile, int step) {
  const int lane = lane_index();
  const void* at[N];
  EFFOPS_UNROLL
  for (int n = 0; n < N; ++n)
    at[n] = tile + Tile<T, kColumns>::Place::offset(16 * n + lane % 8 + lane / 16 * 8, 2 * step + lane / 8 % 2);
  ldmatrix_x4(to, at);
}

// Rows [row, row + 16) of the tile are rows of the right operand (values): to[n][0..1] are columns [16 (step + n), +
// 8), to[n][2..3] the next eight.
template <class T, int kColumns, int N>
__device__ void load_right_transposed(uint32_t (&to)[N][4], char* tile, int row, int step) {
  const int lane = lane_index();
  const void* at[N];
  EFFOPS_UNROLL
  for (int n = 0; n < N; ++n)
    at[n] = tile + Tile<T, kColumns>::Place::offset(row + lane % 16, 2 * (step + n) + lane / 16);
  ldmatrix_x4<true>(to, at);
}

// As mma_row takes it: N times two tiles of eight columns.
template <int N>
__device__ void as_pairs(uint32_t (&to)[2 * N][2], const uint32_t (&from)[N][4]) {
  EFFOPS_UNROLL
  for (int n = 0; n < N; ++n) EFFOPS_UNROLL
  for (int i = 0; i < 4; ++i) to[2 * n + i / 2][i % 2] = from[n][i];
}

// Two neighbouring result tiles of eight columns are a left operand of sixteen.
template <class T>
__device__ void as_left(uint32_t (&to)[4], const float (&low)[4], const float (&high)[4]) {
  to[0] = pack<T>(low[0], low[1]);
  to[1] = pack<T>(low[2], low[3]);
  to[2] = pack<T>(high[0], high[1]);
  to[3] = pack<T>(high[2], high[3]);
}

// Sums of sixteen rows and kColumns columns, in groups of what is loaded at once.
template <int kColumns>
using RowSums = float[kColumns / (16 * kStepsAtOnce<kColumns>)][2 * kStepsAtOnce<kColumns>][4];

// sums += left [16, 8 N] · the tile's 8 N rows.
template <class T, int kColumns, int N>
__device__ void add_product(RowSums<kColumns>& sums, const float (&left)[N][4], char* tile) {
  constexpr int kAtOnce = kStepsAtOnce<kColumns>, kGroups = kColumns / (16 * kAtOnce);
  EFFOPS_UNROLL
  for (int step = 0; step < N / 2; ++step) {
    uint32_t own[4];
    as_left<T>(own, left[2 * step], left[2 * step + 1]);
    EFFOPS_UNROLL
    for (int n = 0; n < kGroups; ++n) {
      uint32_t right[kAtOnce][4], pairs[2 * kAtOnce][2];
      load_right_transposed<T, kColumns>(right, tile, step * 16, n * kAtOnce);
      as_pairs(pairs, right);
      mma_row<T>(sums[n], own, pairs);
    }
  }
}

// products [16, 8 N] += rows [row, row + 16) of `left` · the 8 N rows of `right`, transposed.
template <class T, int kColumns, int N>
__device__ void add_row_products(float (&products)[N][4], char* left, int row, char* right) {
  EFFOPS_UNROLL
  for (int step = 0; step < kColumns / 16; ++step) {
    uint32_t own[1][4], others[N / 2][4], pairs[N][2];
    load_left<T, kColumns>(own, left, row, step);
    load_right_rows<T, kColumns>(others, right, step);
    as_pairs(pairs, others);
    mma_row<T>(products, own[0], pairs);
  }
}

}  // namespace effops::device
