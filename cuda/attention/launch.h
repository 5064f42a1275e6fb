// Forward attention on the device: parameters, workspace, grids.
#pragma once

#include "attention/load.h"
#include "primitives/launch.h"
#include "primitives/math.h"

namespace effops::device {

inline constexpr int64_t kLargestHead = 256;

// What forward and backward kernels share.
template <class T>
AttentionParams shared_params(const AttentionProblem& p, const AttentionLimits& limits) {
  AttentionParams a;
  a.p = p;
  a.limits = limits;
  if (!p.cu_q) a.limits.max_q_len = p.q_len;
  a.group = FastDivide(static_cast<uint32_t>(p.group()));
  a.page = FastDivide(static_cast<uint32_t>(p.pages.page));
  a.factor = static_cast<float>(p.softcap > 0 ? p.scale / p.softcap : p.scale * kLog2e);
  a.cap = static_cast<float>(p.softcap * kLog2e);
  a.aligned = aligned_rows<T>(p.q, p.cu_q) * AttentionParams::kAlignedQ |
              aligned_rows<T>(p.k, p.cu_k) * AttentionParams::kAlignedK |
              aligned_rows<T>(p.v, p.cu_k) * AttentionParams::kAlignedV;
  return a;
}

int64_t attention_workspace(const AttentionProblem& p, const AttentionLimits& limits);
int attention(const AttentionProblem& p, const AttentionLimits& limits, void* workspace, void* stream);

// The loops of one element type; each grid covers every row block that the loop serves.
template <class T>
int launch_stream(const AttentionParams& a, void* stream);
template <class T>
int launch_block(const AttentionParams& a, void* stream);
int launch_scalar(const AttentionParams& a, void* stream);

// Where queries are ragged, an upper bound of the row blocks of all sequences.
inline int64_t row_blocks_in_all(const AttentionParams& a, int block) {
  if (!a.p.cu_q) return a.p.batch * a.row_blocks;
  return a.limits.q_rows * a.group.divisor / block + a.p.batch;
}

// launch(constant) with the smallest of the head sizes that kernels are built for.
template <int kFirst, int... kRest, class F>
int with_columns(int64_t columns, F&& launch) {
  if constexpr (sizeof...(kRest) == 0) {
    return launch(std::integral_constant<int, kFirst>());
  } else {
    return columns <= kFirst ? launch(std::integral_constant<int, kFirst>()) : with_columns<kRest...>(columns, launch);
  }
}

}  // namespace effops::device
