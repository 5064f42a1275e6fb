// merge_kv: entries that leave a cache are merged into those that stay.
#include <cmath>

#include "common/kv_merge_problem.h"
#include "ops/attention.h"
#include "ops/cache.h"

namespace effops::ops {
namespace {

KvMerge mode_of(const char* op, const std::string& merging) {
  if (merging == "none") return KvMerge::none;
  if (merging == "averaged") return KvMerge::averaged;
  if (merging == "weighted") return KvMerge::weighted;
  EFFOPS_CHECK(merging == "pivotal", op, ": merging: expected none, averaged, pivotal or weighted, got ", merging);
  return KvMerge::pivotal;
}

// int32 [B, G, N]: ascending, within the sequence, then -1.
void check_kept(const Arg& kept, const Values<int32_t>& lens, int64_t slots) {
  const Readable<int32_t> values(kept);
  if (!values) return;
  for (int64_t b = 0; b < kept.size(0); ++b)
    for (int64_t g = 0; g < kept.size(1); ++g) {
      const int64_t len = lens.host() ? lens.host()[b] : slots;
      int64_t last = -1;
      bool over = false;
      for (int64_t i = 0; i < kept.size(2); ++i) {
        const int64_t j = values.at(b, g, i);
        const bool right = j == -1 || (!over && j > last && j < len);
        EFFOPS_CHECK(right, kept.op, ": kept: expected ascending values in [0, ", len, "), then -1 to the end, got ", j,
                     " at index [", b, ", ", g, ", ", i, "]");
        over = j == -1;
        last = j;
      }
    }
}

std::tuple<Tensor, Tensor> merge_kv(Tensor k, Tensor v, Tensor kept, OptionalTensor kv_lens, std::string merging,
                                    std::optional<double> least_similarity) {
  const char* op = "merge_kv";
  const Backend backend(op, k);
  const Arg keys(op, "k", k), values(op, "v", v), stay(op, "kept", kept);
  KvMergeProblem p;
  p.dtype = keys.dtype();
  const CacheShape shape = cache_shape(keys, values, std::nullopt, keys.rank(4, "[B, L, G, D]").size(0));
  p.batch = keys.size(0);
  p.slots = shape.capacity;
  p.heads = shape.heads;
  p.k_dim = keys.size(3);
  p.v_dim = values.size(3);
  p.mode = mode_of(op, merging);
  stay.is(type_int32(), "int32").same_device(keys);
  check_shape(stay, {{"B", p.batch}, {"G", p.heads}, {"N", -1}});
  if (least_similarity) {
    EFFOPS_CHECK(!std::isnan(*least_similarity), op, ": least_similarity: expected a number or None, got nan");
    p.least = *least_similarity;
  }
  const Values<int32_t> lens(op, "kv_lens", kv_lens, {"B", p.batch}, keys);
  check_range(op, "kv_lens", lens, 0, p.slots, "L");
  check_kept(stay, lens, p.slots);
  p.k = view4(keys, keys.mutable_data());
  p.v = view4(values, values.mutable_data());
  p.kept = {reinterpret_cast<const int32_t*>(stay.data()), stay.stride(0), stay.stride(1), stay.stride(2),
            stay.size(2)};
  p.lens = lens.get();
  Tensor nearest = empty({p.batch, p.heads, p.slots}, type_int32(), keys);
  Tensor similarity = empty({p.batch, p.heads, p.slots}, lse_type(p.dtype), keys);
  p.nearest = reinterpret_cast<int32_t*>(Arg(op, "nearest", nearest).mutable_data());
  p.similarity = Arg(op, "similarity", similarity).mutable_data();
  if (p.batch * p.heads * p.slots == 0) return {nearest, similarity};
  if (backend.device()) {
    Tensor memory;
    void* workspace = backend.workspace(memory, keys, &DeviceLibrary::kv_merge_workspace, p);
    backend.launch(&DeviceLibrary::kv_merge, p, workspace);
  } else {
    cpu::kernels().kv_merge(p, torch_threads());
  }
  return {nearest, similarity};
}

}  // namespace

EFFOPS_ON_EVERY_BACKEND(m) { m.impl("merge_kv", TORCH_BOX(&merge_kv)); }

}  // namespace effops::ops
