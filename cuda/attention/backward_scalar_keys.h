// dK and dV in float32 of sixteen keys of a KV head.
#pragma once

#include "attention/backward_scalar.h"
#include "attention/key_block.h"
#include "attention/mask.h"

namespace effops::device {

template <int kColumns>
struct ScalarKeys : BackwardScalar<kColumns> {
  using Base = BackwardScalar<kColumns>;
  using Load = typename Base::Load;
  using Base::kVisiting, Base::p, Base::own_row, Base::member;

  const KeyBlock& block;
  typename Base::Sums dk = {}, dv = {};

  __device__ ScalarKeys(const BackwardParams& params, const KeyBlock& b, char* memory)
      : Base(params, memory), block(b) {}

  __device__ void load(int first, int count) {
    Load::queries(p, block.rows, Base::visiting(0), kVisiting, first, count);
    Load::stats(p, block.rows, Base::stats(), kVisiting, first, count);
  }

  __device__ void work(int first, int count) {
    float s[Base::kEach], ds[Base::kEach];
    Base::multiply(s, 0);
    Base::multiply(ds, 1);
    const bool all = block.sees_all(first, count);
    EFFOPS_UNROLL
    for (int n = 0; n < Base::kEach; ++n) {
      const int at = member + n * Base::kRowThreads;
      Weight w = differentiate(p.a, s[n], ds[n], Base::stats()[at]);
      if (!all &&
          !RowMask(p.a, block.rows, min_of(first + at, block.end - 1)).allows(block.rows, block.first + own_row))
        w = Weight();
      Base::weights(0)[at] = w.p;
      Base::weights(1)[at] = w.ds;
    }
    __syncwarp();  // a row's threads share a warp
    Base::add(dv, 0, 1);
    Base::add(dk, 1, 0);
  }

  __device__ void run() {
    Load::keys(p, block.rows, Base::own(0), Base::kOwn, block.first, block.count);
    const auto first = [&](int i) { return block.begin + i * kVisiting; };
    const auto count = [&](int i) { return min_of(kVisiting, block.end - first(i)); };
    visit_tiles<1>((block.end - block.begin + kVisiting - 1) / kVisiting, [&](int i, int) { load(first(i), count(i)); },
                   [&](int i, int) { work(first(i), count(i)); });
    if (own_row >= block.count) return;
    Base::write(p.g.dk, block.offset(p.a, p.g.dk, own_row), p.a.p.head_dim, dk, p.scale);
    Base::write(p.g.dv, block.offset(p.a, p.g.dv, own_row), p.a.p.v_dim, dv, 1);
  }
};

template <int kColumns>
__global__ void __launch_bounds__(ScalarKeys<kColumns>::kThreads, 4)
    scalar_backward_keys(const __grid_constant__ BackwardParams p) {
  if (const KeyBlock* block = own_key_block(p.a, p.key_blocks, ScalarKeys<kColumns>::kOwn))
    ScalarKeys<kColumns>(p, *block, shared_memory() + kKeyBlockBytes).run();
}

}  // namespace effops::device
