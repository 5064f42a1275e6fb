// mma.m16n8k16 for a row of tiles. Products of two 16-bit numbers are exact in float; sums go up in k.
#include <cstring>

#include "simt/block.h"
#include "simt/convert.h"

// One copy for each instruction set, chosen when the library is loaded; sanitizers are not ready by then.
#if defined(__x86_64__) && !defined(__SANITIZE_ADDRESS__)
#define EFFOPS_SIMT_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define EFFOPS_SIMT_CLONES
#endif

#define EFFOPS_SIMT_INLINE __attribute__((always_inline)) inline

namespace effops::device::simt {
namespace {

constexpr int kRows = MmaScratch::kRows, kDepth = MmaScratch::kDepth;

struct MmaOperands {
  float* d;
  const uint32_t* a;
  const uint32_t* b;
};

using Vector = float __attribute__((vector_size(64), aligned(64)));
constexpr int kVector = 16;

EFFOPS_SIMT_INLINE void widen_all(bool is_bf16, const uint16_t* from, float* to, int count) {
  if (is_bf16)
    for (int i = 0; i < count; ++i) to[i] = from_bf16(from[i]);
  else
    for (int i = 0; i < count; ++i) to[i] = from_f16(from[i]);
}

// d [16][columns] += a [16][16] · b [16][columns], in blocks of kHeight rows and one or two vectors.
template <int kWidth>
EFFOPS_SIMT_INLINE void multiply_block(float* d, const float* a, const float* b, int columns) {
  constexpr int kHeight = 4;
  for (int row = 0; row < kRows; row += kHeight, d += kHeight * columns, a += kHeight * kDepth) {
    Vector sum[kHeight][kWidth];
    for (int i = 0; i < kHeight; ++i)
      for (int j = 0; j < kWidth; ++j) sum[i][j] = *reinterpret_cast<const Vector*>(d + i * columns + j * kVector);
    for (int k = 0; k < kDepth; ++k)
      for (int j = 0; j < kWidth; ++j) {
        const Vector x = *reinterpret_cast<const Vector*>(b + k * columns + j * kVector);
        for (int i = 0; i < kHeight; ++i) sum[i][j] += a[i * kDepth + k] * x;
      }
    for (int i = 0; i < kHeight; ++i)
      for (int j = 0; j < kWidth; ++j) *reinterpret_cast<Vector*>(d + i * columns + j * kVector) = sum[i][j];
  }
}

EFFOPS_SIMT_INLINE void multiply(float* d, const float* a, const float* b, int columns) {
  int first = 0;
  for (; first + 2 * kVector <= columns; first += 2 * kVector) multiply_block<2>(d + first, a, b + first, columns);
  for (; first < columns; first += kVector) multiply_block<1>(d + first, a, b + first, columns);
}

EFFOPS_SIMT_INLINE const MmaOperands& of_lane(void* const* operands, int g, int c) {
  return *static_cast<const MmaOperands*>(operands[4 * g + c]);
}

EFFOPS_SIMT_INLINE void gather_a(MmaScratch& s, void* const* operands) {
  uint32_t* to = reinterpret_cast<uint32_t*>(s.a16);
  for (int g = 0; g < 8; ++g)
    for (int c = 0; c < 4; ++c)
      for (int i = 0; i < 4; ++i) to[(g + i % 2 * 8) * kDepth / 2 + c + i / 2 * 4] = of_lane(operands, g, c).a[i];
}

// Columns are put in the order that makes a lane's own of d neighbours: column 2c + i of tile t at 2 (c n + t) + i.
// Lanes of b with g = 2c and 2c + 1 hold two neighbours then.
EFFOPS_SIMT_INLINE void gather_b(MmaScratch& s, void* const* operands, int n, int columns) {
  for (int c = 0; c < 4; ++c)
    for (int depth = 0; depth < 4; ++depth) {
      const uint32_t* even = of_lane(operands, 2 * c, depth).b;
      const uint32_t* odd = of_lane(operands, 2 * c + 1, depth).b;
      for (int half = 0; half < 2; ++half) {
        uint16_t* row = s.b16 + (2 * depth + 8 * half) * columns + 2 * c * n;
        uint32_t* __restrict low = reinterpret_cast<uint32_t*>(row);
        uint32_t* __restrict high = reinterpret_cast<uint32_t*>(row + columns);
        for (int t = 0; t < n; ++t) {
          const uint32_t x = even[2 * t + half], y = odd[2 * t + half];
          low[t] = (x & 0xffff) | y << 16;
          high[t] = x >> 16 | (y & 0xffff0000u);
        }
      }
    }
}

// Two floats at a time: of row g, of row g + 8, and so on.
EFFOPS_SIMT_INLINE void gather_d(MmaScratch& s, void* const* operands, int n, int columns) {
  for (int g = 0; g < 8; ++g)
    for (int c = 0; c < 4; ++c) {
      const float* from = of_lane(operands, g, c).d;
      float* __restrict top = s.d + g * columns + 2 * c * n;
      float* __restrict bottom = top + 8 * columns;
      for (int t = 0; t < n; ++t) {
        std::memcpy(top + 2 * t, from + 4 * t, 8);
        std::memcpy(bottom + 2 * t, from + 4 * t + 2, 8);
      }
    }
}

EFFOPS_SIMT_INLINE void scatter_d(const MmaScratch& s, void* const* operands, int n, int columns) {
  for (int g = 0; g < 8; ++g)
    for (int c = 0; c < 4; ++c) {
      float* __restrict to = of_lane(operands, g, c).d;
      const float* top = s.d + g * columns + 2 * c * n;
      const float* bottom = top + 8 * columns;
      for (int t = 0; t < n; ++t) {
        std::memcpy(to + 4 * t, top + 2 * t, 8);
        std::memcpy(to + 4 * t + 2, bottom + 2 * t, 8);
      }
    }
}

EFFOPS_SIMT_INLINE void add_product(bool is_bf16, MmaScratch& s, void* const* operands, int n) {
  const int columns = (n + 1) / 2 * kVector;  // whole vectors: what lies behind the tiles is of no use
  gather_a(s, operands);
  gather_b(s, operands, n, columns);
  gather_d(s, operands, n, columns);
  widen_all(is_bf16, s.a16, s.a, kRows * kDepth);
  widen_all(is_bf16, s.b16, s.b, kDepth * columns);
  multiply(s.d, s.a, s.b, columns);
  scatter_d(s, operands, n, columns);
}

// Loops of a known length where it is a usual one.
EFFOPS_SIMT_CLONES void work(bool is_bf16, MmaScratch& s, void* const* operands, int n) {
  switch (n) {
    case 4:
      return add_product(is_bf16, s, operands, 4);
    case 8:
      return add_product(is_bf16, s, operands, 8);
    default:
      return add_product(is_bf16, s, operands, n);
  }
}

// detail: the type, and the number of tiles.
bool execute(Block& b, Warp& w, uint32_t, int64_t detail) {
  const bool is_bf16 = detail & 1;
  const int n = static_cast<int>(detail >> 1);
  work(is_bf16, *b.mma, w.operands, n);
  return true;
}

const WarpOperation kMma{"mma", execute, true};

}  // namespace

void mma_m16n8k16(bool is_bf16, float* d, const uint32_t* a, const uint32_t* b, int n) {
  const void* site = __builtin_return_address(0);
  if (n < 1 || n > MmaScratch::kMostTiles)
    current_lane->block->fail(*current_lane, site, "mma of a row of %d tiles", n);
  MmaOperands o{d, a, b};
  meet(~0u, kMma, int64_t(n) << 1 | is_bf16, &o, site);
}

}  // namespace effops::device::simt
