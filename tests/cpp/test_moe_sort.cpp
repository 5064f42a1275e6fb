// sort_slots and permute_rows: places, ends and rows, one by one.
#include "check.h"
#include "common/moe_sort.h"
#include "tensor.h"
#include "threads.h"

namespace effops::test {
namespace {

struct Sorted {
  std::vector<int32_t> order, inverse, offsets;
};

// Ids of [tokens, k] in memory with these strides; all that is no expert counts as dropped.
Sorted sort(const std::vector<int32_t>& ids, int64_t tokens, int64_t k, int64_t token, int64_t choice,
            int64_t experts) {
  const List<int32_t> given(ids);
  Sorted s{std::vector<int32_t>(tokens * k, -7), std::vector<int32_t>(tokens * k, -7),
           std::vector<int32_t>(experts, -7)};
  SlotSortProblem p;
  p.tokens = tokens;
  p.k = k;
  p.experts = experts;
  p.ids = given.get();
  p.token = token;
  p.choice = choice;
  p.order = s.order.data();
  p.inverse = s.inverse.data();
  p.offsets = s.offsets.data();
  sort_slots(p);
  return s;
}

TEST(sort_by_hand) {
  const Sorted s = sort({2, 0, -1, 2, 0, 2}, 3, 2, 2, 1, 4);
  CHECK(s.order == std::vector<int32_t>({1, 4, 0, 3, 5, 2}), "order");
  CHECK(s.inverse == std::vector<int32_t>({2, 0, -1, 3, 1, 4}), "inverse");
  CHECK(s.offsets == std::vector<int32_t>({2, 2, 5, 5}), "offsets");
}

TEST(sort_with_strides) {  // [2, 3], columns first
  const Sorted s = sort({1, 0, 0, 1, 7, -9}, 2, 3, 1, 2, 2);
  CHECK(s.order == std::vector<int32_t>({1, 3, 0, 4, 2, 5}), "order");
  CHECK(s.inverse == std::vector<int32_t>({2, 0, -1, 1, 3, -1}), "inverse");
  CHECK(s.offsets == std::vector<int32_t>({2, 4}), "offsets");
}

TEST(sort_of_nothing) {
  CHECK(sort({}, 0, 4, 4, 1, 3).offsets == std::vector<int32_t>({0, 0, 0}), "no tokens");
  CHECK(sort({}, 5, 0, 0, 1, 2).offsets == std::vector<int32_t>({0, 0}), "no choices");
}

TEST(sort_is_stable) {
  Random random(5);
  for (int64_t experts : {1, 2, 7, 300}) {
    std::vector<int32_t> ids(600);
    for (int32_t& id : ids) id = static_cast<int32_t>(random.between(-1, experts - 1));
    const Sorted s = sort(ids, 200, 3, 3, 1, experts);
    const int64_t kept = s.offsets[experts - 1];
    for (int64_t i = 0; i < 600; ++i) {
      const int32_t slot = s.order[i], id = ids[slot];
      CHECK((id >= 0) == (i < kept) && s.inverse[slot] == (id >= 0 ? i : -1), "slot ", slot, " at ", i);
      if (id >= 0) CHECK(i < s.offsets[id] && i >= (id > 0 ? s.offsets[id - 1] : 0), "place ", i, " of expert ", id);
      if (i > 0 && i != kept && ids[s.order[i - 1]] == id) CHECK(s.order[i - 1] < slot, "order of expert ", id);
    }
  }
}

TEST(permute_rows) {
  for (DType dtype : kDTypes)
    for (int64_t dim : {0, 1, 33, 700})
      for (int threads : {1, 3}) {
        constexpr int64_t kTokens = 120, kChoices = 2, kExperts = 5;
        Random random(6);
        Tensor x(dtype, {1, 1, kTokens, dim}, Layout::gapped), y(dtype, {1, 1, kTokens * kChoices, dim});
        x.fill(random);
        x.freeze();
        std::vector<int32_t> ids(kTokens * kChoices);
        for (int32_t& id : ids) id = static_cast<int32_t>(random.between(-1, kExperts - 1));
        const Sorted s = sort(ids, kTokens, kChoices, kChoices, 1, kExperts);
        PermuteProblem p;
        p.dtype = dtype;
        p.slots = kTokens * kChoices;
        p.k = kChoices;
        p.dim = dim;
        p.experts = kExperts;
        p.x = x.data();
        p.x_row = x.stride(2);
        p.order = s.order.data();
        p.offsets = s.offsets.data();
        p.y = y.data();
        permute_rows(p, std_threads(threads));
        for (int64_t i = 0; i < p.slots; ++i)
          for (int64_t d = 0; d < dim; ++d) {
            const double want = i < s.offsets[kExperts - 1] ? x.get(0, 0, s.order[i] / kChoices, d) : 0;
            CHECK(y.get(0, 0, i, d) == want, "row ", i, " of ", name_of(dtype));
          }
      }
}

}  // namespace
}  // namespace effops::test
