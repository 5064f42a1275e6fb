// Rows of float32, which mma would round: a lane has a feature, and all lanes read the same inputs.
#pragma once

#include "gemv/panel.h"

namespace effops::device {

template <PackedFormat kFormat>
struct PackedScalar {
  static constexpr int kRows = 4, kWarps = 8;
  static constexpr int64_t kSharedBytes = int64_t(kWarps) * kRows * kPackedPanel * sizeof(float);

  __device__ static void run(const PackedParams& a) {
    const PackedMatrix& w = a.p.weight;
    const int64_t first = int64_t(blockIdx.y) * kRows, octets = w.padded_group() / 8;
    float* const sums = reinterpret_cast<float*>(shared_memory());
    for (int64_t index = blockIdx.x; index < w.panels(); index += gridDim.x) {
      const PackedPanel<kFormat> panel(w, index);
      float total[kRows] = {};
      Octets own = Octets::of(w.groups() * octets, kWarps);
      while (own.count > 0) {
        const int64_t group = own.first / octets, begin = own.first - group * octets;
        const int64_t count = min_of(own.count, octets - begin);
        add_group(a, panel, first, group, begin, begin + count, total);
        own.first += count;
        own.count -= count;
      }
      for (int r = 0; r < kRows; ++r) sums[(warp_index() * kRows + r) * kPackedPanel + lane_index()] = total[r];
      write_results<float>(a.p.linear, sums, kWarps, kRows, first, index, panel.width());
      __syncthreads();  // the sums are the next panel's
    }
  }

 private:
  __device__ static void add_group(const PackedParams& a, const PackedPanel<kFormat>& panel, int64_t first,
                                   int64_t group, int64_t begin, int64_t end, float (&total)[kRows]) {
    const uint32_t step = panel.step(group, lane_index());
    const float zero = static_cast<float>(step & kPackedZero);
    float sum[kRows] = {};
    for (int64_t octet = begin; octet < end; ++octet) {
      uint32_t words[kOctetWords<kFormat>];
      panel.load(words, group, octet, lane_index());
      EFFOPS_UNROLL
      for (int r = 0; r < kRows; ++r) {
        if (first + r >= a.p.linear.rows) break;
        const auto x = load_inputs<float>(a, first + r, group, octet);
        EFFOPS_UNROLL
        for (int i = 0; i < 8; ++i) sum[r] += number_of<kFormat>(words, i, zero) * x.item[i];
      }
    }
    for (int r = 0; r < kRows; ++r) total[r] += step_of(step) * sum[r];
  }
};

}  // namespace effops::device
