// y = x W^T (+ bias) (+ residual) with W in few bits. Floor: W's bytes; a block reads a panel's once for all rows of a
// tile.
#include "gemv/gemv.h"
#include "gemv/packed_mma.h"
#include "gemv/packed_scalar.h"
#include "primitives/launch.h"

namespace effops::device {
namespace {

template <class Kernel>
__global__ void __launch_bounds__(Kernel::kWarps* kWarp) packed_linear_panels(const __grid_constant__ PackedParams a) {
  Kernel::run(a);
}

template <class Kernel>
int start(const PackedParams& a, void* stream) {
  constexpr int64_t kMostPanels = 1 << 16;
  const int64_t tiles = (a.p.linear.rows + Kernel::kRows - 1) / Kernel::kRows;
  if (tiles > 65535) return kUnsupported;
  const dim3 grid(static_cast<unsigned>(min_of(a.p.weight.panels(), kMostPanels)), static_cast<unsigned>(tiles));
  return launch<PackedParams>({"packed_linear", grid, Kernel::kWarps * kWarp, Kernel::kSharedBytes, stream},
                              &packed_linear_panels<Kernel>, a);
}

template <class T, PackedFormat kFormat>
int of_rows(const PackedParams& a, void* stream) {
  if constexpr (sizeof(T) == 4) {
    return start<PackedScalar<kFormat>>(a, stream);
  } else {
    if (a.p.linear.rows <= 8 || a.p.invariant) return start<PackedMma<T, kFormat, 1>>(a, stream);
    if (a.p.linear.rows <= 16) return start<PackedMma<T, kFormat, 2>>(a, stream);
    return start<PackedMma<T, kFormat, 4>>(a, stream);
  }
}

template <class T>
int of_format(const PackedParams& a, void* stream) {
  switch (a.p.weight.format) {
    case PackedFormat::int4:
      return of_rows<T, PackedFormat::int4>(a, stream);
    case PackedFormat::int8:
      return of_rows<T, PackedFormat::int8>(a, stream);
    case PackedFormat::fp8_e4m3:
      return of_rows<T, PackedFormat::fp8_e4m3>(a, stream);
  }
  return kUnsupported;
}

}  // namespace

int packed_linear(const PackedLinearProblem& p, void* stream) {
  const LinearProblem& l = p.linear;
  const int64_t item = size_of(l.dtype);
  const PackedParams a{p, in_pieces(l.x, item, {l.x_row, p.weight.group})};
  switch (l.dtype) {
    case DType::bf16:
      return of_format<bf16>(a, stream);
    case DType::f16:
      return of_format<f16>(a, stream);
    case DType::f32:
      return of_format<float>(a, stream);
    default:
      return kUnsupported;
  }
}

}  // namespace effops::device
