// One weight and the gradient of its score (FlashAttention-2; Dao 2023, algorithm 2, lines 11 to 14).
#pragma once

#include "attention/backward_params.h"
#include "attention/softmax.h"

namespace effops::device {

struct Weight {
  float p = 0, ds = 0;  // ds: of <q, k>, without the scale, which sums over ds take at the end
};

// From <q, k> and the gradient of the weight, <d_out, v>.
__device__ inline Weight differentiate(const AttentionParams& a, float product, float dp, RowStats row) {
  const float score = score_of(a, product);
  Weight w;
  w.p = exp2_approx(score - row.lse2);
  w.ds = w.p * (dp - row.delta);
  if (a.cap != 0) {
    const float t = score / a.cap;
    w.ds *= 1 - t * t;
  }
  return w;
}

}  // namespace effops::device
