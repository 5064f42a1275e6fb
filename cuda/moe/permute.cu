// Rows of tokens into expert order: y[i] = x[order[i] / k], and zeros past the last expert's end.
#include "moe/moe.h"
#include "primitives/divide.h"
#include "primitives/element.h"

namespace effops::device {
namespace {

constexpr int kMostThreads = 256;

struct Params {
  PermuteProblem p;
  FastDivide k;
};

template <class T, int kCount>
__global__ void permute_rows_of(const __grid_constant__ Params a) {
  const PermuteProblem& p = a.p;
  const int64_t end = p.experts ? p.offsets[p.experts - 1] : 0;
  const int64_t begin = (int64_t(blockIdx.y) * blockDim.x + threadIdx.x) * kCount;
  const int64_t step = int64_t(gridDim.y) * blockDim.x * kCount;
  for (int64_t row = blockIdx.x; row < p.slots; row += gridDim.x) {
    const int64_t slot = row < end ? p.order[row] : -1;
    const bool absent = slot < 0 || slot >= p.slots;
    const T* const from =
        reinterpret_cast<const T*>(p.x) + (absent ? 0 : a.k.quotient(static_cast<uint32_t>(slot)) * p.x_row);
    T* const to = reinterpret_cast<T*>(p.y) + row * p.dim;
    for (int64_t d = begin; d < p.dim; d += step)
      (absent ? Items<T, kCount>{} : Items<T, kCount>::load(from + d)).store(to + d);
  }
}

template <class T, int kCount>
int start(const PermuteProblem& p, void* stream) {
  if (p.dim == 0 || p.slots == 0) return 0;
  const int64_t pieces = (p.dim + kCount - 1) / kCount;
  const int threads = threads_for(pieces, kMostThreads);
  dim3 grid = stride_grid(p.slots);
  grid.y = static_cast<unsigned>(min_of<int64_t>((pieces + threads - 1) / threads, 64));
  return launch<Params>({"permute_rows", grid, threads, 0, stream}, &permute_rows_of<T, kCount>,
                        Params{p, FastDivide(static_cast<uint32_t>(p.k))});
}

}  // namespace

int permute_rows(const PermuteProblem& p, void* stream) {
  return with_element(p.dtype, [&](auto element) {
    using T = decltype(element);
    const bool pieces = in_pieces(p.x, sizeof(T), {p.dim, p.x_row}) && in_pieces(p.y, sizeof(T), {});
    return pieces ? start<T, kItems16<T>>(p, stream) : start<T, 1>(p, stream);
  });
}

}  // namespace effops::device
