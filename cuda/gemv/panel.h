// A panel of a packed weight as a block sees it, and its share of the work: all rows of a tile against 32 features, the
// inner dimension split among warps.
#pragma once

#include "gemv/numbers.h"
#include "primitives/element.h"
#include "primitives/shared_memory.h"

namespace effops::device {

struct PackedParams {
  PackedLinearProblem p;
  bool x_pieces;  // rows are fit for 16-byte accesses, and so are the groups in them
};

// Eight inputs of a group: the last ones of a group may lack some.
struct Octets {
  int64_t first, count;  // of the warp

  // The share of a warp of `warps` in `all`.
  __device__ static Octets of(int64_t all, int warps) {
    const int64_t begin = all * warp_index() / warps;
    return {begin, all * (warp_index() + 1) / warps - begin};
  }
};

template <PackedFormat kFormat>
class PackedPanel {
  static constexpr int kWords = kOctetWords<kFormat>;

 public:
  __device__ PackedPanel(const PackedMatrix& w, int64_t panel)
      : width_(static_cast<int>(min_of<int64_t>(kPackedPanel, w.out - panel * kPackedPanel))),
        group_words_(w.group_words()),
        data_(reinterpret_cast<const uint32_t*>(w.data) + panel * kPackedPanel * w.row_words()) {}

  __device__ int width() const { return width_; }
  // Features behind the last are read as that one.
  __device__ void load(uint32_t (&to)[kWords], int64_t group, int64_t octet, int feature) const {
    const uint32_t* const from = at(group, octet * kWords, feature);
    EFFOPS_UNROLL
    for (int i = 0; i < kWords; ++i) to[i] = from[i * width_];
  }
  __device__ uint32_t step(int64_t group, int feature) const { return *at(group, group_words_ - 1, feature); }

 private:
  __device__ const uint32_t* at(int64_t group, int64_t word, int feature) const {
    return data_ + (group * group_words_ + word) * width_ + min_of(feature, width_ - 1);
  }

  int width_;
  int64_t group_words_;
  const uint32_t* data_;
};

__device__ inline float step_of(uint32_t word) { return std::bit_cast<float>(word & ~kPackedZero); }

// Eight inputs of a row of x; zeros for a row that is not there, and behind the group's last input.
template <class T>
__device__ Items<T, 8> load_inputs(const PackedParams& a, int64_t row, int64_t group, int64_t octet) {
  const LinearProblem& l = a.p.linear;
  const int64_t first = octet * 8, left = row < l.rows ? a.p.weight.group - first : 0;
  const T* const x =
      reinterpret_cast<const T*>(l.x) + (left > 0 ? row * l.x_row + group * a.p.weight.group + first : 0);
  if constexpr (sizeof(T) == 2) {
    return Items<T, 8>::load_some(x, left, a.x_pieces);
  } else {
    const auto low = Items<T, 4>::load_some(x, left, a.x_pieces);
    const auto high = Items<T, 4>::load_some(x + 4, left - 4, a.x_pieces);
    Items<T, 8> all;
    EFFOPS_UNROLL
    for (int i = 0; i < 8; ++i) all.item[i] = i < 4 ? low.item[i] : high.item[i - 4];
    return all;
  }
}

// Sums of the block's warps, [warp][row][kPackedPanel] in shared memory, to results of `rows` rows from `first` on.
template <class T>
__device__ void write_results(const LinearProblem& l, const float* sums, int warps, int tile_rows, int64_t first,
                              int64_t panel, int width) {
  __syncthreads();
  const int rows = static_cast<int>(min_of<int64_t>(tile_rows, l.rows - first));
  for (int i = threadIdx.x; i < rows * kPackedPanel; i += blockDim.x) {
    const int row = i / kPackedPanel, column = i % kPackedPanel;
    if (column >= width) continue;
    float sum = 0;
    for (int warp = 0; warp < warps; ++warp) sum += sums[(warp * tile_rows + row) * kPackedPanel + column];
    const int64_t feature = panel * kPackedPanel + column;
    if (l.bias != nullptr) sum += widen(reinterpret_cast<const T*>(l.bias)[feature]);
    if (l.residual != nullptr)
      sum += widen(reinterpret_cast<const T*>(l.residual)[(first + row) * l.residual_row + feature]);
    reinterpret_cast<T*>(l.y)[(first + row) * l.y_row + feature] = narrow<T>(sum);
  }
}

}  // namespace effops::device
