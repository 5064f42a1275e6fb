// Rows of a 16-bit type: tiles of 8 rows are the columns of mma, 32 features its rows, and eight neighbouring inputs a
// lane's depth. Which input of the eight is where in mma's depth does not matter, as long as both sides agree.
#pragma once

#include "gemv/panel.h"
#include "primitives/mma.h"

namespace effops::device {

template <class T, PackedFormat kFormat, int kTiles>
class PackedMma {
  static constexpr int kBatch = 4;  // fours of octets whose words are asked for together
  using Words = uint32_t[kOctetWords<kFormat>];

 public:
  static constexpr int kRows = 8 * kTiles, kWarps = kTiles == 1 ? 16 : 8;
  static constexpr int64_t kSharedBytes = int64_t(kWarps) * kRows * kPackedPanel * sizeof(float);

  __device__ static void run(const PackedParams& a) {
    const PackedMatrix& w = a.p.weight;
    const int64_t first = int64_t(blockIdx.y) * kRows;
    for (int64_t panel = blockIdx.x; panel < w.panels(); panel += gridDim.x) {
      PackedMma self(a, panel, first);
      self.add_all();
      float* const sums = reinterpret_cast<float*>(shared_memory());
      self.put(sums + warp_index() * kRows * kPackedPanel);
      write_results<T>(a.p.linear, sums, kWarps, kRows, first, panel, self.panel_.width());
      __syncthreads();  // the sums are the next panel's
    }
  }

 private:
  __device__ PackedMma(const PackedParams& a, int64_t panel, int64_t first)
      : a_(a), panel_(a.p.weight, panel), first_(first) {
    clear(total_);
  }

  static __device__ void clear(float (&sum)[2][kTiles][4]) {
    EFFOPS_UNROLL
    for (int m = 0; m < 2; ++m) EFFOPS_UNROLL
    for (int n = 0; n < kTiles; ++n) EFFOPS_UNROLL
    for (int e = 0; e < 4; ++e) sum[m][n][e] = 0;
  }

  // The warp's share of the fours of octets of all groups.
  __device__ void add_all() {
    const PackedMatrix& w = a_.p.weight;
    const int64_t fours = (w.padded_group() / 8 + 3) / 4;
    Octets own = Octets::of(w.groups() * fours, kWarps);
    while (own.count > 0) {
      const int64_t group = own.first / fours, begin = own.first - group * fours;
      const int64_t count = min_of(own.count, fours - begin);
      add_group(group, begin, begin + count);
      own.first += count;
      own.count -= count;
    }
  }

  __device__ void add_group(int64_t group, int64_t begin, int64_t end) {
    float sum[2][kTiles][4];
    clear(sum);
    PairZero<T, kFormat> zeros[4];
    EFFOPS_UNROLL
    for (int f = 0; f < 4; ++f) zeros[f] = PairZero<T, kFormat>::of(panel_.step(group, feature(f)));
    for (int64_t at = begin; at < end; at += kBatch) {
      Words words[kBatch][4];
      EFFOPS_UNROLL
      for (int b = 0; b < kBatch; ++b) EFFOPS_UNROLL
      for (int f = 0; f < 4; ++f) load(words[b][f], group, at + b, end, f);
      EFFOPS_UNROLL
      for (int b = 0; b < kBatch; ++b)
        if (at + b < end) add(sum, words[b], zeros, group, at + b);
    }
    EFFOPS_UNROLL
    for (int m = 0; m < 2; ++m) EFFOPS_UNROLL
    for (int half = 0; half < 2; ++half) {
      const float scale = step_of(panel_.step(group, feature(2 * m + half)));
      EFFOPS_UNROLL
      for (int n = 0; n < kTiles; ++n) EFFOPS_UNROLL
      for (int e = 0; e < 2; ++e) total_[m][n][2 * half + e] += scale * sum[m][n][2 * half + e];
    }
  }

  // The lane's own octet of a four; behind the last one of a group, x is zero and any words will do.
  __device__ int64_t octet(int64_t four) const { return four * 4 + lane_index() % 4; }
  __device__ int feature(int f) const { return lane_index() / 4 + 8 * f; }

  __device__ void load(Words& to, int64_t group, int64_t four, int64_t end, int f) const {
    const int64_t last = a_.p.weight.padded_group() / 8 - 1;
    panel_.load(to, group, min_of(octet(min_of(four, end - 1)), last), feature(f));
  }

  __device__ void add(float (&sum)[2][kTiles][4], const Words (&words)[4], const PairZero<T, kFormat> (&zeros)[4],
                      int64_t group, int64_t four) const {
    uint32_t right[2][kTiles][2];
    EFFOPS_UNROLL
    for (int n = 0; n < kTiles; ++n) {
      const auto x = load_inputs<T>(a_, first_ + 8 * n + lane_index() / 4, group, octet(four));
      EFFOPS_UNROLL
      for (int i = 0; i < 4; ++i)
        right[i / 2][n][i % 2] = uint32_t(x.item[paired_input<kFormat>(i, 0)].bits) |
                                 uint32_t(x.item[paired_input<kFormat>(i, 1)].bits) << 16;
    }
    EFFOPS_UNROLL
    for (int m = 0; m < 2; ++m) EFFOPS_UNROLL
    for (int step = 0; step < 2; ++step) {
      uint32_t left[4];
      EFFOPS_UNROLL
      for (int i = 0; i < 4; ++i)
        left[i] = pair_of<T, kFormat>(words[2 * m + i % 2], 2 * step + i / 2, zeros[2 * m + i % 2]);
      mma_row<T>(sum[m], left, right[step]);
    }
  }

  __device__ void put(float* to) const {
    EFFOPS_UNROLL
    for (int m = 0; m < 2; ++m) EFFOPS_UNROLL
    for (int n = 0; n < kTiles; ++n) EFFOPS_UNROLL
    for (int e = 0; e < 4; ++e)
      to[(8 * n + lane_index() % 4 * 2 + e % 2) * kPackedPanel + feature(2 * m + e / 2)] = total_[m][n][e];
  }

  const PackedParams& a_;
  PackedPanel<kFormat> panel_;
  int64_t first_;
  float total_[2][kTiles][4];
};

}  // namespace effops::device
