// What the weight gradient of a grouped product is started with.
#pragma once

#include "common/device_grouped_plan.h"

namespace effops::device {

// Rows and columns of a tile of dw.
constexpr int gradient_tile(bool float32) { return float32 ? 64 : 128; }

struct GradientParams {
  GroupedGradientProblem p;
  int in_tiles = 0, out_tiles = 0;
  int64_t tiles = 0;
  bool x_pieces = false, dy_pieces = false, dw_pieces = false;  // rows are fit for 16-byte accesses
};

template <class T>
int launch_grouped_gradient(const GradientParams& a, void* stream);

}  // namespace effops::device
