// The GEMM-shaped loop of accumulate_mass: 64 keys a thread block, sixteen a warp, visited by tiles of 64 rows.
#pragma once

#include "attention/fragments.h"
#include "attention/mass_rows.h"

namespace effops::device {

template <class T, int kColumns>
struct MassTiles {
  using Rows = Tile<T, kColumns>;
  static constexpr int kOwn = kBlockRows, kWarps = kOwn / 16, kThreads = kWarps * kWarp, kVisiting = 64, kStages = 2;
  using Load = MassLoad<T, kColumns, kThreads>;
  static constexpr int kStageBytes = Rows::bytes(kVisiting) + kVisiting * static_cast<int>(sizeof(float));
  static constexpr int kBytes = Rows::bytes(kOwn) + kStages * kStageBytes;

  const MassParams& p;
  const KeyBlock& block;
  char* shared;
  float sum[2] = {};  // of this lane's upper and lower key, over the rows that are its columns

  __device__ MassTiles(const MassParams& params, const KeyBlock& b, char* memory)
      : p(params), block(b), shared(memory) {}

  __device__ char* visiting(int stage) const { return shared + Rows::bytes(kOwn) + stage * kStageBytes; }
  __device__ float* lse2(int stage) const { return reinterpret_cast<float*>(visiting(stage) + Rows::bytes(kVisiting)); }
  __device__ static int own_key(int half) { return warp_index() * 16 + lane_index() / 4 + 8 * half; }

  __device__ void load(int i, int stage) {
    const int first = block.begin + i * kVisiting;
    Load::queries(p.a, block.rows, visiting(stage), lse2(stage), kVisiting, first,
                  min_of(kVisiting, block.end - first));
  }

  __device__ void work(int i, int stage) {
    float s[kVisiting / 8][4] = {};
    add_row_products<T, kColumns>(s, shared, warp_index() * 16, visiting(stage));
    const int first = block.begin + i * kVisiting;
    const bool all = block.sees_all(first, min_of(kVisiting, block.end - first));
    EFFOPS_UNROLL
    for (int n = 0; n < kVisiting / 8; ++n) EFFOPS_UNROLL
    for (int e = 0; e < 2; ++e) {
      const int at = n * 8 + lane_index() % 4 * 2 + e;
      const float base = lse2(stage)[at];
      RowMask mask;
      if (!all) mask = RowMask(p.a, block.rows, min_of(first + at, block.end - 1));
      EFFOPS_UNROLL
      for (int h = 0; h < 2; ++h) {
        const float weight = exp2_approx(score_of(p.a, s[n][2 * h + e]) - base);
        sum[h] += all || mask.allows(block.rows, block.first + own_key(h)) ? weight : 0;
      }
    }
  }

  __device__ void run() {
    Load::keys(p.a, block, shared, kOwn);
    visit_tiles<kStages>((block.end - block.begin + kVisiting - 1) / kVisiting,
                         [&](int i, int stage) { load(i, stage); }, [&](int i, int stage) { work(i, stage); });
    EFFOPS_UNROLL
    for (int h = 0; h < 2; ++h) {
      const float whole = reduce_lanes<4>(sum[h], Sum());
      if (lane_index() % 4 == 0) add_mass(p, block, own_key(h), whole);
    }
  }
};

}  // namespace effops::device
