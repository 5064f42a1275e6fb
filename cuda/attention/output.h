// Where a row's result goes: to the caller, or to the partial results of its split.
#pragma once

#include "attention/row_block.h"
#include "attention/softmax.h"
#include "primitives/convert.h"

namespace effops::device {

struct RowOutput {
  bool partial;
  int64_t out, row;  // offsets in elements: of the row, and of its log-sum-exp or its sums

  __device__ RowOutput(const AttentionParams& a, const RowBlock& b, int split, int r) : partial(b.splits > 1) {
    if (partial) {
      row = b.slot(a, split, r);
      out = row * a.p.v_dim;
    } else {
      out = b.offset(a, a.p.out, r);
      row = b.offset(a, a.p.lse, r);
    }
  }

  // Writes what the keys of this split, or all keys, add up to (one thread of the row's does); returns what the row's
  // weighted sum is to be multiplied with. A learned logit joins the denominator where no other split follows.
  __device__ float finish(const AttentionParams& a, const RowBlock& b, int r, RowSoftmax sums, bool writes) const {
    if (partial) {
      if (writes) {
        a.partial_tops[row] = sums.top;
        a.partial_sums[row] = sums.sum;
      }
      return 1;
    }
    float factor = 1;
    if (a.p.sink_logits) {
      const float logit = a.p.sink_logits[b.head_of(a, r)] * kLog2e;
      factor = sums.rescale(logit);
      sums.sum += sums.weight(logit);
    }
    if (writes) reinterpret_cast<float*>(a.p.lse.data)[row] = sums.lse2() * kLn2;
    return sums.sum == 0 ? 0.0f : factor / sums.sum;
  }

  template <class T>
  __device__ void write(const AttentionParams& a, int column, float value) const {
    if (column >= a.p.v_dim) return;
    if (partial) {
      a.partial_out[out + column] = value;
    } else if (a.p.wide_out) {
      reinterpret_cast<float*>(a.p.out.data)[out + column * a.p.out.dim] = value;
    } else {
      reinterpret_cast<T*>(a.p.out.data)[out + column * a.p.out.dim] = narrow<T>(value);
    }
  }
};

}  // namespace effops::device
