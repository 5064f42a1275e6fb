// Routing of tokens to experts, and the moves between token order and expert order.
#include "ops/moe.h"

#include <torch/csrc/stable/ops.h>

#include <cmath>
#include <limits>

#include "common/moe_sort.h"
#include "ops/backend.h"

namespace effops::ops {
namespace {

using OptionalTensor = std::optional<Tensor>;
constexpr int64_t kMaxSlots = std::numeric_limits<int32_t>::max(), kMaxExperts = 1 << 24;

template <class T>
T* data_of(const Arg& a) {
  return reinterpret_cast<T*>(a.mutable_data());
}

std::tuple<Tensor, Tensor> topk_routing(Tensor logits, int64_t k, std::string scoring, bool renormalize, double scale,
                                        OptionalTensor bias, int64_t groups, int64_t topk_group,
                                        std::string group_score) {
  const char* op = "topk_routing";
  const Backend backend(op, logits);
  const Arg a(op, "logits", logits);
  RoutingProblem p;
  p.dtype = a.dtype();
  a.rank(2, "[N, E]");
  p.tokens = a.size(0);
  p.experts = a.size(1);
  EFFOPS_CHECK(p.experts >= 1 && p.experts <= kMaxExperts, op, ": logits: expected E in [1, ", kMaxExperts,
               "], got shape ", a.shape());
  EFFOPS_CHECK(scoring == "softmax" || scoring == "sigmoid", op, ": scoring: expected softmax or sigmoid, got ",
               scoring);
  EFFOPS_CHECK(std::isfinite(scale), op, ": scale: expected a finite number, got ", scale);
  EFFOPS_CHECK(groups >= 1 && p.experts % groups == 0, op, ": groups: expected a divisor of E = ", p.experts, ", got ",
               groups);
  EFFOPS_CHECK(topk_group >= 1 && topk_group <= groups, op, ": topk_group: expected a number in [1, ", groups,
               "] (groups), got ", topk_group);
  EFFOPS_CHECK(group_score == "max" || group_score == "top2", op, ": group_score: expected max or top2, got ",
               group_score);
  const int64_t size = p.experts / groups;
  EFFOPS_CHECK(group_score == "max" || size >= 2, op,
               ": group_score: expected two experts a group or more for top2, got ", size);
  EFFOPS_CHECK(k >= 1 && k <= topk_group * size, op, ": k: expected a number in [1, ", topk_group * size, "] (",
               groups > 1 ? "experts of topk_group groups" : "E", "), got ", k);
  EFFOPS_CHECK(p.tokens <= kMaxSlots / k, op, ": logits: expected N * k below 2^31, got shape ", a.shape());
  const Values<float> biases(op, "bias", bias, {"E", p.experts}, a);
  p.k = k;
  p.logits = a.data();
  p.token = a.stride(0);
  p.expert = a.stride(1);
  p.scoring = scoring == "softmax" ? Scoring::softmax : Scoring::sigmoid;
  p.renormalize = renormalize;
  p.scale = scale;
  p.bias = biases.get();
  p.groups = groups;
  p.chosen_groups = topk_group;
  p.two_best = group_score == "top2";
  const DType wide = p.dtype == DType::f64 ? DType::f64 : DType::f32;
  Tensor weights = empty({p.tokens, k}, type_of(wide), a), ids = empty({p.tokens, k}, type_int32(), a);
  p.weights = data_of<float>(Arg(op, "weights", weights));
  p.ids = data_of<int32_t>(Arg(op, "ids", ids));
  backend.run(&cpu::Kernels::routing, &DeviceLibrary::topk_routing, p);
  return {weights, ids};
}

std::tuple<Tensor, Tensor, Tensor> moe_sort(Tensor ids, int64_t num_experts) {
  const Backend backend("moe_sort", ids);
  const Arg a("moe_sort", "ids", ids);
  const SortedSlots sorted = sort_slots(backend, a, num_experts);
  return {sorted.order, sorted.inverse, sorted.offsets};
}

std::tuple<Tensor, Tensor, Tensor> moe_permute(Tensor x, Tensor ids, int64_t num_experts) {
  const char* op = "moe_permute";
  const Backend backend(op, x);
  Arg a(op, "x", x);
  const Arg i(op, "ids", ids);
  PermuteProblem p;
  p.dtype = a.dtype();
  a.rank(2, "[N, d]");
  i.is(type_int32(), "int32").same_device(a);
  check_shape(i, {{"N", a.size(0)}, {"K", -1}});
  const SortedSlots sorted = sort_slots(backend, i, num_experts);
  if (a.size(1) > 1 && a.stride(1) != 1) {
    x = torch::stable::contiguous(x);
    a = Arg(op, "x", x);
  }
  p.k = i.size(1);
  p.slots = i.numel();
  p.dim = a.size(1);
  p.experts = num_experts;
  p.x = a.data();
  p.x_row = a.stride(0);
  p.order = reinterpret_cast<const int32_t*>(Arg(op, "order", sorted.order).data());
  p.offsets = reinterpret_cast<const int32_t*>(Arg(op, "offsets", sorted.offsets).data());
  Tensor y = empty({p.slots, p.dim}, a.type, a);
  p.y = Arg(op, "y", y).mutable_data();
  if (backend.device()) {
    backend.launch(&DeviceLibrary::permute_rows, p);
  } else {
    permute_rows(p, torch_threads());
  }
  return {y, sorted.offsets, sorted.inverse};
}

Tensor moe_unpermute(Tensor y, OptionalTensor weights, Tensor inverse) {
  const char* op = "moe_unpermute";
  const Backend backend(op, y);
  Arg a(op, "y", y);
  const Arg i(op, "inverse", inverse);
  UnpermuteProblem p;
  p.dtype = a.dtype();
  a.rank(2, "[M, d]");
  i.is(type_int32(), "int32").same_device(a).rank(2, "[N, K]");
  p.tokens = i.size(0);
  p.k = i.size(1);
  p.slots = a.size(0);
  p.dim = a.size(1);
  if (weights) {
    const Arg w(op, "weights", *weights);
    const bool wide = p.dtype == DType::f64;
    w.is(wide ? type_of(DType::f64) : type_float32(), wide ? "float64" : "float32").same_device(a);
    check_shape(w, {{"N", p.tokens}, {"K", p.k}});
    p.weights = contiguous_data(w, *weights);
  }
  const Readable<int32_t> places(i);
  for (int64_t t = 0; places && t < p.tokens; ++t)
    for (int64_t j = 0; j < p.k; ++j)
      EFFOPS_CHECK(places.at(t, j) >= -1 && places.at(t, j) < p.slots, op, ": inverse: expected values in [-1, ",
                   p.slots, ") (rows of y), got ", places.at(t, j), " at index [", t, ", ", j, "]");
  p.inverse = reinterpret_cast<const int32_t*>(contiguous_data(i, inverse));
  if (a.size(1) > 1 && a.stride(1) != 1) {
    y = torch::stable::contiguous(y);
    a = Arg(op, "y", y);
  }
  p.y = a.data();
  p.y_row = a.stride(0);
  Tensor out = empty({p.tokens, p.dim}, a.type, a);
  p.out = Arg(op, "out", out).mutable_data();
  backend.run(&cpu::Kernels::unpermute, &DeviceLibrary::unpermute_rows, p);
  return out;
}

}  // namespace

SortedSlots sort_slots(const Backend& backend, const Arg& ids, int64_t experts) {
  const char* op = ids.op;
  ids.is(type_int32(), "int32").rank(2, "[N, K]");
  EFFOPS_CHECK(experts >= 1 && experts <= kMaxExperts, op, ": num_experts: expected a number in [1, ", kMaxExperts,
               "], got ", experts);
  EFFOPS_CHECK(ids.numel() <= kMaxSlots, op, ": ids: expected N * K below 2^31, got shape ", ids.shape());
  SlotSortProblem p;
  p.tokens = ids.size(0);
  p.k = ids.size(1);
  p.experts = experts;
  const Readable<int32_t> values(ids);
  for (int64_t t = 0; values && t < p.tokens; ++t)
    for (int64_t j = 0; j < p.k; ++j)
      EFFOPS_CHECK(values.at(t, j) >= -1 && values.at(t, j) < experts, op, ": ids: expected values in [-1, ", experts,
                   "), got ", values.at(t, j), " at index [", t, ", ", j, "]");
  p.ids = reinterpret_cast<const int32_t*>(ids.data());
  p.token = ids.stride(0);
  p.choice = ids.stride(1);
  const SortedSlots sorted{empty({p.slots()}, type_int32(), ids), empty({p.tokens, p.k}, type_int32(), ids),
                           empty({experts}, type_int32(), ids)};
  p.order = data_of<int32_t>(Arg(op, "order", sorted.order));
  p.inverse = data_of<int32_t>(Arg(op, "inverse", sorted.inverse));
  p.offsets = data_of<int32_t>(Arg(op, "offsets", sorted.offsets));
  if (backend.device()) {
    Tensor memory;
    void* workspace = backend.workspace(memory, ids, &DeviceLibrary::sort_slots_workspace, p);
    backend.launch(&DeviceLibrary::sort_slots, p, workspace);
  } else {
    effops::sort_slots(p);
  }
  return sorted;
}

EFFOPS_ON_EVERY_BACKEND(m) {
  m.impl("topk_routing", TORCH_BOX(&topk_routing));
  m.impl("moe_sort", TORCH_BOX(&moe_sort));
  m.impl("moe_permute", TORCH_BOX(&moe_permute));
  m.impl("moe_unpermute", TORCH_BOX(&moe_unpermute));
}

}  // namespace effops::ops
