// accumulate_mass in float32 by FMA: sixteen keys a thread block, eight neighbouring threads a key.
#pragma once

#include "attention/mass_rows.h"
#include "primitives/vector.h"

namespace effops::device {

template <class T, int kColumns>  // T: float
struct MassScalar {
  using Rows = Tile<T, kColumns>;
  static constexpr int kOwn = kStreamRows, kKeyThreads = 8, kThreads = kOwn * kKeyThreads;
  static constexpr int kVisiting = 32, kEach = kVisiting / kKeyThreads;  // rows of a thread: member, member + 8, …
  using Load = MassLoad<T, kColumns, kThreads>;
  static constexpr int kBytes =
      Rows::bytes(kOwn) + Rows::bytes(kVisiting) + kVisiting * static_cast<int>(sizeof(float));

  const MassParams& p;
  const KeyBlock& block;
  char *shared, *visiting;
  float* lse2;
  int own_key, member;
  float sum = 0;

  __device__ MassScalar(const MassParams& params, const KeyBlock& b, char* memory)
      : p(params),
        block(b),
        shared(memory),
        visiting(memory + Rows::bytes(kOwn)),
        lse2(reinterpret_cast<float*>(visiting + Rows::bytes(kVisiting))),
        own_key(threadIdx.x / kKeyThreads),
        member(threadIdx.x % kKeyThreads) {}

  __device__ void work(int first, int count) {
    float s[kEach] = {};
    for (int c = 0; c < Rows::kChunks; ++c) {
      const Float4 x = load_float4(shared + Rows::Place::offset(own_key, c));
      EFFOPS_UNROLL
      for (int n = 0; n < kEach; ++n) {
        const Float4 y = load_float4(visiting + Rows::Place::offset(member + n * kKeyThreads, c));
        EFFOPS_UNROLL
        for (int e = 0; e < 4; ++e) s[n] = fmaf(x.x[e], y.x[e], s[n]);
      }
    }
    const bool all = block.sees_all(first, count);
    EFFOPS_UNROLL
    for (int n = 0; n < kEach; ++n) {
      const int at = member + n * kKeyThreads;
      const float weight = exp2_approx(score_of(p.a, s[n]) - lse2[at]);
      const bool counts =
          all || RowMask(p.a, block.rows, min_of(first + at, block.end - 1)).allows(block.rows, block.first + own_key);
      sum += counts ? weight : 0;
    }
  }

  __device__ void run() {
    Load::keys(p.a, block, shared, kOwn);
    const auto first = [&](int i) { return block.begin + i * kVisiting; };
    const auto count = [&](int i) { return min_of(kVisiting, block.end - first(i)); };
    visit_tiles<1>((block.end - block.begin + kVisiting - 1) / kVisiting,
                   [&](int i, int) { Load::queries(p.a, block.rows, visiting, lse2, kVisiting, first(i), count(i)); },
                   [&](int i, int) { work(first(i), count(i)); });
    sum = reduce_lanes<kKeyThreads>(sum, Sum());
    if (member == 0) add_mass(p, block, own_key, sum);
  }
};

}  // namespace effops::device
