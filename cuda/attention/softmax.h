// Scores in base 2, from products of queries and keys.
#pragma once

#include "attention/params.h"
#include "primitives/softmax.h"

namespace effops::device {

__device__ inline float score_of(const AttentionParams& a, float product) {
  return a.cap != 0 ? a.cap * tanhf(a.factor * product) : a.factor * product;
}

}  // namespace effops::device
