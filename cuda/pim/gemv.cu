// Units at memory banks, emulated: a block has a tile of a vector's product, a thread the unit of one of its banks.
// The bits are those of the CPU's loop, so that no product is fused into a sum.
#include "pim/pim.h"

#include "primitives/element.h"

namespace effops::device {
namespace {

constexpr int kMostThreads = 128;

template <class T>
__global__ void banked_gemv(const __grid_constant__ PimGemvProblem p) {
  const int64_t pieces = p.batch * p.rows * p.tiles;
  for (int64_t piece = blockIdx.x; piece < pieces; piece += gridDim.x) {
    const int64_t tile = piece % p.tiles, m = piece / p.tiles % p.rows, b = piece / p.tiles / p.rows;
    const T* const x = reinterpret_cast<const T*>(p.x) + b * p.x_batch + m * p.x_row;
    for (int64_t unit = threadIdx.x; unit < p.units; unit += blockDim.x) {
      const int64_t n = tile * p.units + unit;
      if (n >= p.out) break;
      const T* const bank = reinterpret_cast<const T*>(p.banks) + p.row_at(b, n);
      const int64_t there = n < p.out_len(b) ? p.in_len(b) : 0;
      float* const results = reinterpret_cast<float*>(p.results) + ((b * p.rows + m) * p.out + n) * p.sums;
      for (int64_t s = 0; s < p.sums; ++s) {
        float sum = 0;
        const int64_t last = (s + 1) * p.sum_values, end = last < there ? last : there;
        for (int64_t k = s * p.sum_values; k < end; k += p.lanes) {
          float products[PimGemvProblem::kMostLanes];
          for (int64_t i = 0; i < p.lanes; ++i)
            products[i] = i < end - k ? __fmul_rn(widen(x[(k + i) * p.x_value]), widen(bank[p.value_at(k + i)])) : 0.0f;
          for (int64_t width = p.lanes / 2; width >= 1; width /= 2)
            for (int64_t i = 0; i < width; ++i) products[i] = __fadd_rn(products[2 * i], products[2 * i + 1]);
          sum = __fadd_rn(sum, products[0]);
        }
        results[s] = p.narrow ? widen(narrow<T>(sum)) : sum;
      }
    }
  }
}

}  // namespace

int pim_gemv(const PimGemvProblem& p, void* stream) {
  return with_element(p.dtype, [&](auto element) {
    using T = decltype(element);
    if constexpr (sizeof(T) == 8) {
      return kUnsupported;
    } else {
      return launch<PimGemvProblem>(
          {"pim_gemv", stride_grid(p.batch * p.rows * p.tiles), threads_for(p.units, kMostThreads), 0, stream},
          &banked_gemv<T>, p);
    }
  });
}

}  // namespace effops::device
