#include "sampling/sampling.h"

#include "sampling/row.h"

namespace effops::device {
namespace {

constexpr int kMostThreads = 1024;

struct Params {
  SamplingProblem p;
  bool pieces;
  int64_t* flaw;
};

template <class T>
__global__ void __launch_bounds__(kMostThreads) sampling_rows(Params a) {
  using C = Compute<T>;
  const SamplingProblem& p = a.p;
  for (int64_t row = blockIdx.x; row < p.rows.rows(); row += gridDim.x) {
    SamplingRow<T> r(p, row, a.pieces);
    C* const law = p.tokens ? nullptr : reinterpret_cast<C*>(p.probs) + row * p.size;
    const RowFlaw flaw = r.look();
    int64_t token = 0;
    if (flaw != RowFlaw::none) {
      if (a.flaw != nullptr && threadIdx.x == 0)
        atomicMin(reinterpret_cast<Mass*>(a.flaw), static_cast<Mass>(row * 4 + static_cast<int64_t>(flaw)));
      for (int64_t i = threadIdx.x; law != nullptr && i < p.size; i += blockDim.x) law[i] = static_cast<C>(NAN);
    } else if (p.temperature == 0) {
      token = r.greedy();
      for (int64_t i = threadIdx.x; law != nullptr && i < p.size; i += blockDim.x) law[i] = i == token ? C(1) : C(0);
    } else {
      r.filter();
      law != nullptr ? r.law(law) : void(token = r.draw(p.uniforms[row]));
    }
    if (p.tokens != nullptr && threadIdx.x == 0) p.tokens[row] = token;
    __syncthreads();  // shared memory is the next row's
  }
}

}  // namespace

int sampling(const SamplingProblem& p, int64_t* flaw, void* stream) {
  if (p.best > 0) return kUnsupported;
  const int threads = p.size <= 4096 ? 128 : kMostThreads;
  return with_element(p.dtype, [&](auto element) {
    using T = decltype(element);
    const bool pieces = in_pieces(p.x, sizeof(T), {p.rows.stride[0], p.rows.stride[1], p.rows.stride[2]});
    return launch<Params>({"sampling", stride_grid(p.rows.rows()), threads, SamplingRow<T>::kSharedBytes, stream},
                          &sampling_rows<T>, Params{p, pieces, flaw});
  });
}

}  // namespace effops::device
