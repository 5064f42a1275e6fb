#include <climits>

#include "moe/grouped.h"
#include "moe/grouped_gradient_params.h"
#include "primitives/element.h"

namespace effops::device {

int64_t grouped_gradient_workspace(const GroupedGradientProblem&) { return 0; }

int grouped_gradient(const GroupedGradientProblem& p, void*, void* stream) {
  if (p.dtype == DType::f64 || p.in > INT_MAX || p.out > INT_MAX) return kUnsupported;
  if (p.in == 0 || p.out == 0 || p.groups == 0) return 0;
  const int64_t tile = gradient_tile(p.dtype == DType::f32), item = size_of(p.dtype);
  GradientParams a;
  a.p = p;
  a.in_tiles = static_cast<int>((p.in + tile - 1) / tile);
  a.out_tiles = static_cast<int>((p.out + tile - 1) / tile);
  a.tiles = p.groups * a.in_tiles * a.out_tiles;
  a.x_pieces = in_pieces(p.x, item, {p.x_row});
  a.dy_pieces = in_pieces(p.dy, item, {p.dy_row});
  a.dw_pieces = in_pieces(p.dw, item, {p.out});
  switch (p.dtype) {
    case DType::bf16:
      return launch_grouped_gradient<bf16>(a, stream);
    case DType::f16:
      return launch_grouped_gradient<f16>(a, stream);
    default:
      return launch_grouped_gradient<float>(a, stream);
  }
}

}  // namespace effops::device
