#include "moe/grouped.h"

#include <climits>

#include "moe/grouped_params.h"
#include "moe/hopper_plan.h"
#include "primitives/element.h"

namespace effops::device {
namespace {

// Are inputs of an output feature neighbours in w, or outputs of an input feature? Strides of one element are any.
enum class Layout { inputs, outputs, neither };
Layout layout_of(const GroupedProblem& p) {
  if (p.w_in == 1 || p.in <= 1) return Layout::inputs;
  return p.w_out == 1 || p.out <= 1 ? Layout::outputs : Layout::neither;
}

GroupedParams params_of(const GroupedProblem& p, const GroupedPlan& plan, Layout layout) {
  GroupedParams a;
  a.p = p;
  a.k = FastDivide(static_cast<uint32_t>(max_of<int64_t>(p.k, 1)));
  a.column_tiles = static_cast<int>(plan.column_tiles);
  const bool inputs = layout == Layout::inputs;
  if (p.gated) a.pairing = p.interleaved && !inputs ? Pairing::adjacent : Pairing::blocks;
  const int64_t item = size_of(p.dtype), weight = p.scale != nullptr ? 1 : item;
  a.x_pieces = in_pieces(p.x, item, {p.x_row});
  a.w_pieces = in_pieces(p.w, weight, {p.groups > 1 ? p.w_group : 0, inputs ? p.w_out : p.w_in}) &&
               (inputs || a.pairing != Pairing::blocks || p.out / 2 * weight % 16 == 0);
  a.y_pieces = in_pieces(p.y, item, {p.y_row});
  return a;
}

template <class T, class U>
int run(const GroupedParams& a, const GroupedPlan& plan, Layout layout, void* stream) {
  return layout == Layout::inputs ? launch_grouped<T, U, true>(a, plan, stream)
                                  : launch_grouped<T, U, false>(a, plan, stream);
}

template <class T>
int run(const GroupedParams& a, const GroupedPlan& plan, Layout layout, void* stream) {
  return a.p.scale != nullptr ? run<T, int8_t>(a, plan, layout, stream) : run<T, T>(a, plan, layout, stream);
}

}  // namespace

int64_t grouped_workspace(const GroupedProblem& p) {
  return hopper_serves(p) && hopper_enabled() ? hopper_workspace(p) : 0;
}

int grouped(const GroupedProblem& p, void* workspace, void* stream) {
  if (hopper_serves(p) && hopper_enabled()) return hopper_grouped(p, workspace, stream);
  const Layout layout = layout_of(p);
  if (p.dtype == DType::f64 || p.layout == WeightLayout::panels || layout == Layout::neither ||
      (p.gated && p.out_sizes != nullptr) || p.in > INT_MAX || p.out > INT_MAX)
    return kUnsupported;
  if (p.rows == 0 || p.features() == 0) return 0;
  const GroupedPlan plan = plan_grouped(p);
  if (plan.tiles_at_most > INT_MAX || p.rows > INT_MAX) return kUnsupported;
  const GroupedParams a = params_of(p, plan, layout);
  switch (p.dtype) {
    case DType::bf16:
      return run<bf16>(a, plan, layout, stream);
    case DType::f16:
      return run<f16>(a, plan, layout, stream);
    default:
      return run<float>(a, plan, layout, stream);
  }
}

}  // namespace effops::device
