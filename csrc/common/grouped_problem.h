// Products of rows sorted by group with one matrix a group, free of torch. Strides are in elements.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/host_device.h"

namespace effops {

// Of a gate g and an up value u; without a gate, of the value alone (u = 1).
enum class Activation : int8_t {
  none,
  silu,        // g sigmoid(g) u
  gelu,        // g Phi(g) u
  gelu_tanh,   // its tanh approximation
  relu2,       // max(g, 0)^2 u
  swiglu_oai,  // min(g, 7) sigmoid(1.702 min(g, 7)) (clamp(u, -7, 7) + 1)
};

// How the matrices of the groups lie in memory.
enum class WeightLayout : int8_t {
  rows,     // the inputs of an output feature side by side (w_in = 1)
  columns,  // the output features of an input side by side (w_out = 1)
  panels,   // of 32 output features each, ready for the CPU's loop (cpu/moe/panel.h); CPU only
};

// y[i] = epilogue(x[source(i)] w[g]) for the rows i of each group g; rows past the last group's end become zero.
struct GroupedProblem {
  DType dtype = DType::f32;
  int64_t rows = 0, in = 0, out = 0, groups = 0;
  const int32_t* offsets = nullptr;  // [groups]: the end of each group's rows
  const char* x = nullptr;
  int64_t x_row = 0;
  const int32_t* order = nullptr;  // row i comes from x[order[i] / k]; null: from x[i]
  int64_t k = 1;
  const char* w = nullptr;
  WeightLayout layout = WeightLayout::rows;
  int64_t w_group = 0, w_in = 0, w_out = 0;  // strides of w [groups, in, out]; one of the last two is 1
  const float* scale = nullptr;              // [groups, out]: w is int8, and these are its steps
  const char* bias = nullptr;                // [groups, out]
  // Features that a group has, the rest is neither read nor anything but zero in y; null: all.
  const int32_t *in_sizes = nullptr, *out_sizes = nullptr;
  Activation activation = Activation::none;
  bool gated = false;        // gate and up value are two features; y has half of them
  bool interleaved = false;  // features 2j and 2j + 1, otherwise j and out / 2 + j
  char* y = nullptr;
  int64_t y_row = 0;

  bool invariant = false;  // rows come out the same whatever other rows their group has (CPU)

  EFFOPS_HD int64_t features() const { return gated ? out / 2 : out; }  // of y
};

// dw[g] = x^T dy over the rows of group g; zero for an empty group.
struct GroupedGradientProblem {
  DType dtype = DType::f32;
  int64_t rows = 0, in = 0, out = 0, groups = 0;
  const int32_t* offsets = nullptr;
  const char *x = nullptr, *dy = nullptr;
  int64_t x_row = 0, dy_row = 0;
  const int32_t *in_sizes = nullptr, *out_sizes = nullptr;  // beyond: zero
  char* dw = nullptr;                                       // [groups, in, out] contiguous
};

}  // namespace effops
