// Grouped products by CUTLASS on sm_90a (hopper_grouped.cu), opt-in. Here is what needs no CUTLASS: which calls it
// serves, and its lists of one problem a group, which a kernel of ours writes on the device, where the offsets are.
#pragma once

#include <cstdint>

#include "common/grouped_problem.h"

namespace effops::device {

// Lists of `groups` items each, in the workspace.
struct HopperProblems {
  int32_t* shapes = nullptr;  // rows, outputs, inputs
  const void **x = nullptr, **w = nullptr;
  void** y = nullptr;
  int64_t *x_strides = nullptr, *w_strides = nullptr, *y_strides = nullptr;  // from row to row, or line to line of w
  char* end = nullptr;                                                       // what is behind them, 256-byte aligned

  static HopperProblems at(void* workspace, int64_t groups);
  static int64_t bytes(int64_t groups);
};

// Plain bfloat16 products whose addresses and sizes are fit for TMA, of a group or more.
bool hopper_serves(const GroupedProblem& p);
// Was it built, is it asked for (EFFOPS_HOPPER_GROUPED=1), and is this the device for it?
bool hopper_enabled();

// Fills in the lists; rows past the last group's end become zero.
int write_hopper_problems(const GroupedProblem& p, const HopperProblems& to, void* stream);

int64_t hopper_workspace(const GroupedProblem& p);
int hopper_grouped(const GroupedProblem& p, void* workspace, void* stream);

}  // namespace effops::device
