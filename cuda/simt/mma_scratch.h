// Where mma puts together what the lanes of a warp hold.
#pragma once

#include <cstdint>

namespace effops::device::simt {

struct MmaScratch {
  static constexpr int kRows = 16, kDepth = 16, kColumns = 8, kMostTiles = 32;
  alignas(64) uint16_t a16[kRows * kDepth];
  alignas(64) float a[kRows * kDepth];
  alignas(64) uint16_t b16[kDepth * kColumns * kMostTiles];
  alignas(64) float b[kDepth * kColumns * kMostTiles];
  alignas(64) float d[kRows * kColumns * kMostTiles];
};

}  // namespace effops::device::simt
