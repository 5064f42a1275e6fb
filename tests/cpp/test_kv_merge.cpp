// kv_merge against its definition, in guarded memory: what it writes, and nothing read or written beyond.
#include <algorithm>

#include "check.h"
#include "kernels_under_test.h"
#include "tensor.h"
#include "threads.h"

namespace effops::test {
namespace {

struct Case {
  int64_t slots, dim, every;  // an entry of `every` stays
  int64_t len;
  KvMerge mode;
  Layout layout;
};

// Keys are multiples of unit vectors, so that an entry is nearest to the first kept one of its direction; where there
// is none, it is as near to all. Values are small multiples of 1/16: sums are exact.
void merge(const Case& c, DType dtype, Random& random) {
  constexpr int64_t kBatch = 2, kHeads = 2, kValues = 19;
  Tensor k(dtype, {kBatch, c.slots, kHeads, c.dim}, c.layout);
  Tensor v(dtype, {kBatch, c.slots, kHeads, kValues}, c.layout);
  std::vector<int32_t> kept;
  for (int64_t j = c.every - 1; j < c.len; j += c.every) kept.push_back(static_cast<int32_t>(j));
  const int64_t places = static_cast<int64_t>(kept.size()) + 2;
  kept.resize(places, -1);
  std::vector<int64_t> direction(c.slots);
  std::vector<double> values(c.slots * kValues);
  for (int64_t j = 0; j < c.len; ++j) {
    direction[j] = random.between(0, c.dim - 1);
    const double size = static_cast<double>(random.between(1, 4));
    for (int64_t d = 0; d < kValues; ++d) values[j * kValues + d] = random.value();
    for (int64_t b = 0; b < kBatch; ++b)
      for (int64_t g = 0; g < kHeads; ++g) {
        for (int64_t d = 0; d < c.dim; ++d) k.set(b, j, g, d, d == direction[j] ? size : 0);
        for (int64_t d = 0; d < kValues; ++d) v.set(b, j, g, d, values[j * kValues + d]);
      }
  }
  const List<int32_t> stay(kept), lens(std::vector<int32_t>(kBatch, static_cast<int32_t>(c.len)));
  const int64_t all = kBatch * kHeads * c.slots;
  std::vector<int32_t> nearest(all + 1, 77);
  Guarded similarity(all * size_of(compute_type(dtype)));
  KvMergeProblem p;
  p.dtype = dtype;
  p.mode = c.mode;
  p.batch = kBatch;
  p.slots = c.slots;
  p.heads = kHeads;
  p.k_dim = c.dim;
  p.v_dim = kValues;
  p.k = k.view();
  p.v = v.view();
  p.kept = {stay.get(), 0, 0, 1, places};
  p.lens = lens.get();
  p.nearest = nearest.data();
  p.similarity = similarity.data();
  kernels_under_test().kv_merge(p, std_threads(3));

  const int64_t count = places - 2;
  std::vector<int64_t> to(c.slots, -1), members(count + 1, 0);
  for (int64_t j = 0; j < c.len; ++j) {
    const bool stays = (j + 1) % c.every == 0;
    if (stays) to[j] = j / c.every;
    if (stays || count == 0 || c.mode == KvMerge::none) continue;
    to[j] = 0;
    for (int64_t i = count - 1; i >= 0; --i)
      if (direction[kept[i]] == direction[j]) to[j] = i;
    ++members[to[j]];
  }
  bool same = nearest.back() == 77, right = true;
  for (int64_t i = 0; i < all; ++i) same = same && nearest[i] == to[i % c.slots];
  for (int64_t i = 0; i < count; ++i)
    for (int64_t d = 0; d < kValues; ++d) {
      const double own = values[kept[i] * kValues + d];
      double sum = 0;
      for (int64_t j = 0; j < c.len; ++j) {
        if (to[j] != i || j == kept[i]) continue;
        const double x = values[j * kValues + d], like = direction[j] == direction[kept[i]];
        sum += merged_part(c.mode, x, own, like);
      }
      const double want = own + sum / static_cast<double>(members[i] + 1);
      for (int64_t b = 0; b < kBatch; ++b)
        for (int64_t g = 0; g < kHeads; ++g)
          right = right && std::abs(v.get(b, i, g, d) - want) <= 2 * roundoff(dtype) * std::max(1.0, std::abs(want));
    }
  for (int64_t j = count; j < c.len; ++j) right = right && v.get(1, j, 1, 0) == values[j * kValues];
  CHECK(same && right && k.gaps_intact() && v.gaps_intact(), c.slots, " slots, ", c.len, " valid, one of ", c.every,
        " kept, dim ", c.dim, ", mode ", static_cast<int>(c.mode), ", ", name_of(dtype));
}

TEST(kv_merge_orthogonal_keys) {
  Random random(5);
  for (DType dtype : kDTypes)
    for (const KvMerge mode : {KvMerge::none, KvMerge::averaged, KvMerge::pivotal, KvMerge::weighted})
      for (const int64_t slots : {1, 7, 128, 129, 300})
        for (const int64_t every : {1, 2, 5, 400})
          for (const int64_t dim : {1, 7, 33})
            merge({slots, dim, every, slots - slots / 4, mode, random.pick({Layout::contiguous, Layout::strided})},
                  dtype, random);
}

}  // namespace
}  // namespace effops::test
