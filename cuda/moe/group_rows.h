// Where groups lie among the rows. Offsets that are out of range or decrease are cut to what is: groups may overlap
// then, but stay inside.
#pragma once

#include "common/host_device.h"
#include "primitives/platform.h"

namespace effops::device {

struct GroupRows {
  int64_t begin = 0, end = 0;

  __device__ static GroupRows of(const int32_t* offsets, int64_t rows, int64_t group) {
    const int64_t begin = group > 0 ? clamp_to<int64_t>(offsets[group - 1], 0, rows) : 0;
    return {begin, clamp_to<int64_t>(offsets[group], begin, rows)};
  }
  __device__ int64_t count() const { return end - begin; }
};

// Features that a group has, of `all`.
__device__ inline int group_size(const int32_t* sizes, int64_t group, int64_t all) {
  return static_cast<int>(sizes != nullptr ? clamp_to<int64_t>(sizes[group], 0, all) : all);
}

}  // namespace effops::device
