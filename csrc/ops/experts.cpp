// fused_experts: a layer of experts in one call.
#include <torch/csrc/stable/ops.h>

#include <utility>

#include "ops/grouped.h"
#include "ops/moe.h"
#include "ops/packed.h"

namespace effops::ops {
namespace {

constexpr const char* kOp = "fused_experts";
constexpr int64_t kPanel = 32;  // features (cpu/moe/panel.h)

Activation activation_of(const std::string& name) {
  constexpr std::pair<const char*, Activation> kNames[] = {
      {"silu", Activation::silu},
      {"gelu", Activation::gelu},
      {"gelu_tanh", Activation::gelu_tanh},
      {"relu2", Activation::relu2},
      {"swiglu_oai", Activation::swiglu_oai},
  };
  for (const auto& [known, activation] : kNames)
    if (name == known) return activation;
  fail(kOp, ": activation: expected silu, gelu, gelu_tanh, relu2 or swiglu_oai, got ", name);
}

// The dtype of a weight: x's, or int8 beside its scales [E, out].
void check_format(GroupedProblem& p, const Arg& w, const Arg& x, const char* scale_name, OptionalTensor& scale) {
  if (!scale) {
    w.same_dtype(x).same_device(x);
    return;
  }
  w.is(aoti_torch_dtype_int8(), "int8").same_device(x);
  const Arg s(kOp, scale_name, *scale);
  s.is(type_float32(), "float32").same_device(x);
  check_shape(s, {{"E", p.groups}, {"features", p.out}});
  p.scale = reinterpret_cast<const float*>(contiguous_data(s, *scale));
}

void take_bias(GroupedProblem& p, const char* name, const Arg& x, OptionalTensor& bias) {
  if (!bias) return;
  const Arg b(kOp, name, *bias);
  b.same_dtype(x).same_device(x);
  check_shape(b, {{"E", p.groups}, {"features", p.out}});
  p.bias = contiguous_data(b, *bias);
}

// A weight in panels: [E, panels, steps, 32] elements, pairs of bfloat16 or int8 [E, panels, steps, 64].
void take_panels(GroupedProblem& p, const Arg& w, bool pairs) {
  const int64_t features = p.gated ? p.out / 2 : p.out, each = p.gated ? kPanel / 2 : kPanel;
  check_shape(w, {{"E", p.groups},
                  {"panels", (features + each - 1) / each},
                  {"steps", pairs ? (p.in + 1) / 2 : p.in},
                  {"elements", pairs ? 2 * kPanel : kPanel}});
  int64_t step = 1;
  for (int64_t i = 4; i-- > 0; step *= w.size(i))
    EFFOPS_CHECK(w.size(i) <= 1 || w.stride(i) == step, kOp, ": ", w.name, ": expected contiguous panels, got strides");
  p.layout = WeightLayout::panels;
  p.w = w.data();
  p.w_group = w.numel() / std::max<int64_t>(p.groups, 1);
}

// Weights [E, rows, row bytes] of few bits, whose rows are the columns of tiles.
PackedMatrix take_packed(const GroupedProblem& p, const Arg& w, const Arg& x) {
  const int64_t features = p.gated ? p.out / 2 : p.out, each = p.gated ? kPanel / 2 : kPanel;
  check_shape(w, {{"E", p.groups}, {"rows of tiles", (features + each - 1) / each * kPanel}, {"row bytes", -1}});
  const Arg first = at_first(w);
  EFFOPS_CHECK(w.size(0) <= 1 || w.numel() == 0 || w.stride(0) == w.size(1) * w.size(2), kOp, ": ", w.name,
               ": expected contiguous memory, got strides");
  return packed_matrix(first, p.in, x);
}

// sort, gather and gate-up, down, weighted sum: four kernels.
void on_device(const Backend& backend, ExpertsProblem& p, const Arg& x, const int32_t* inverse) {
  GroupedProblem &first = p.gate_up, &second = p.down;
  Tensor hidden = empty({first.rows, first.features()}, x.type, x), y = empty({second.rows, second.out}, x.type, x);
  first.y = Arg(kOp, "hidden", hidden).mutable_data();
  first.y_row = first.features();
  launch_grouped(backend, first, x);
  second.order = nullptr;
  second.x = first.y;
  second.x_row = first.y_row;
  second.y = Arg(kOp, "y", y).mutable_data();
  second.y_row = second.out;
  launch_grouped(backend, second, x);
  const UnpermuteProblem sum{first.dtype, p.tokens,   first.k,   second.out, second.rows,
                             second.y,    second.out, p.weights, inverse,    p.out};
  backend.launch(&DeviceLibrary::unpermute_rows, sum);
}

Tensor fused_experts(Tensor x, Tensor w_gate_up, Tensor w_down, Tensor weights, Tensor ids, std::string activation,
                     bool gated, bool interleaved, OptionalTensor bias_gate_up, OptionalTensor bias_down,
                     OptionalTensor scale_gate_up, OptionalTensor scale_down, int64_t packed_features,
                     bool batch_invariant) {
  const Backend backend(kOp, x);
  Arg a(kOp, "x", x);
  const Arg up(kOp, "w_gate_up", w_gate_up), down(kOp, "w_down", w_down), i(kOp, "ids", ids);
  ExpertsProblem p;
  GroupedProblem &first = p.gate_up, &second = p.down;
  first.dtype = second.dtype = a.dtype();
  a.rank(2, "[N, d]");
  const int64_t tokens = a.size(0), dim = a.size(1);
  const bool packed = packed_features > 0;
  EFFOPS_CHECK(!packed || backend.device() == nullptr, kOp,
               ": packed_features: expected 0 on devices, which read plain weights, got ", packed_features);
  EFFOPS_CHECK(gated || !interleaved, kOp, ": interleaved: expected False without a gate, got True");
  EFFOPS_CHECK(!packed || !interleaved, kOp, ": interleaved: expected False beside packed_features, got True");
  const char* up_shape = packed ? "[E, panels, steps, elements]" : gated ? "[E, 2f, d]" : "[E, f, d]";
  const bool few_bits = packed && is_packed(up) && !scale_gate_up;
  if (few_bits) up_shape = "[E, rows, row bytes]";
  const int rank = packed && !few_bits ? 4 : 3;
  up.rank(rank, up_shape);
  down.rank(rank, packed ? up_shape : "[E, d, f]");
  const int64_t hidden = packed ? packed_features : down.size(2);
  first.groups = second.groups = up.size(0);
  first.in = second.out = dim;
  first.out = gated ? 2 * hidden : hidden;
  second.in = hidden;
  first.gated = gated;
  first.interleaved = interleaved;
  first.activation = activation_of(activation);
  EFFOPS_CHECK(gated || first.activation != Activation::swiglu_oai, kOp,
               ": activation: expected another than swiglu_oai without a gate, got swiglu_oai");
  if (!few_bits) check_format(first, up, a, "scale_gate_up", scale_gate_up);
  EFFOPS_CHECK(scale_gate_up.has_value() == scale_down.has_value(), kOp, ": scale_down: expected ",
               scale_gate_up ? "a tensor beside scale_gate_up, got none" : "none without scale_gate_up, got a tensor");
  if (!few_bits) check_format(second, down, a, "scale_down", scale_down);
  if (few_bits) {
    EFFOPS_CHECK(is_packed(down), kOp, ": w_down: expected few bits beside w_gate_up, got dtype ", down.type_name());
    p.packed_gate_up = take_packed(first, up, a);
    p.packed_down = take_packed(second, down, a);
  } else if (packed) {
    const bool pairs = first.dtype == DType::bf16 || scale_gate_up.has_value();
    take_panels(first, up, pairs);
    take_panels(second, down, pairs);
  } else {
    check_shape(up, {{"E", first.groups}, {gated ? "2f" : "f", first.out}, {"d", dim}});
    check_shape(down, {{"E", first.groups}, {"d", dim}, {"f", hidden}});
    take_weight(first, up, w_gate_up, true);
    take_weight(second, down, w_down, true);
  }
  take_bias(first, "bias_gate_up", a, bias_gate_up);
  take_bias(second, "bias_down", a, bias_down);
  i.is(type_int32(), "int32").same_device(a);
  check_shape(i, {{"N", tokens}, {"K", -1}});
  const int64_t k = i.size(1);
  const Arg w(kOp, "weights", weights);
  const bool wide = first.dtype == DType::f64;
  w.is(wide ? type_of(DType::f64) : type_float32(), wide ? "float64" : "float32").same_device(a);
  check_shape(w, {{"N", tokens}, {"K", k}});
  p.weights = contiguous_data(w, weights);
  a = rows_in_line(a, x);

  const SortedSlots sorted = sort_slots(backend, i, first.groups);
  first.rows = second.rows = i.numel();
  first.offsets = second.offsets = reinterpret_cast<const int32_t*>(Arg(kOp, "offsets", sorted.offsets).data());
  first.order = second.order = reinterpret_cast<const int32_t*>(Arg(kOp, "order", sorted.order).data());
  first.k = second.k = k;
  first.invariant = second.invariant = batch_invariant;
  first.x = a.data();
  first.x_row = a.stride(0);
  p.tokens = tokens;
  Tensor out = empty({tokens, dim}, a.type, a);
  p.out = Arg(kOp, "out", out).mutable_data();
  if (backend.device()) {
    on_device(backend, p, a, reinterpret_cast<const int32_t*>(Arg(kOp, "inverse", sorted.inverse).data()));
  } else {
    cpu::kernels().experts(p, torch_threads());
  }
  return out;
}

}  // namespace

EFFOPS_ON_EVERY_BACKEND(m) { m.impl("fused_experts", TORCH_BOX(&fused_experts)); }

}  // namespace effops::ops
