// The sort of slots, and rows to expert order and back.
#include "kernel_memory.h"
#include "moe/moe.h"

namespace effops::test {
namespace {

struct Sorted {
  Buffer<int32_t> order, inverse, offsets;
};

// Slots of these experts by a plain stable sort, and by the kernels.
Sorted sort(const std::vector<int32_t>& ids, int64_t tokens, int64_t k, int64_t experts, bool strided = false) {
  const int64_t slots = tokens * k;
  Buffer<int32_t> given(slots);
  SlotSortProblem p;
  p.tokens = tokens;
  p.k = k;
  p.experts = experts;
  p.token = strided ? 1 : k;
  p.choice = strided ? tokens : 1;
  for (int64_t a = 0; a < slots; ++a) given[a / k * p.token + a % k * p.choice] = ids[a];
  Sorted s{Buffer<int32_t>(slots), Buffer<int32_t>(slots), Buffer<int32_t>(experts)};
  Buffer<char> workspace(device::sort_slots_workspace(p));
  p.ids = given.get();
  p.order = s.order.get();
  p.inverse = s.inverse.get();
  p.offsets = s.offsets.get();
  run_within({given.extent("ids"), s.order.extent("order", true), s.inverse.extent("inverse", true),
              s.offsets.extent("offsets", true), workspace.extent("workspace", true)},
             "sort", [&] { return device::sort_slots(p, workspace.get(), nullptr); });
  int64_t place = 0;
  for (int64_t e = 0; e <= experts; ++e) {
    for (int64_t a = 0; a < slots; ++a) {
      const bool dropped = ids[a] < 0 || ids[a] >= experts;
      if (dropped ? e < experts : ids[a] != e) continue;
      CHECK(s.order[place] == a, slots, " slots, place ", place, ": ", s.order[place], ", expected ", a);
      CHECK(s.inverse[a] == (dropped ? -1 : place), slots, " slots, slot ", a, ": ", s.inverse[a]);
      ++place;
    }
    if (e < experts) CHECK(s.offsets[e] == place, slots, " slots, expert ", e, ": ", s.offsets[e]);
  }
  return s;
}

std::vector<int32_t> draw_ids(int64_t slots, int experts, int seed) {
  Integers draw(seed);
  std::vector<int32_t> ids(slots);
  for (int32_t& id : ids) id = draw(0, 5) ? draw(0, experts - 1) / 2 * (draw(0, 1) + 1) : draw(-2, experts + 1);
  return ids;
}

TEST(slots_sorted) {
  for (int64_t tokens : {0, 1, 5, 33, 700})
    for (int experts : {1, 7, 64, 300}) sort(draw_ids(tokens * 3, experts, experts), tokens, 3, experts);
  sort(draw_ids(60, 9, 3), 20, 3, 9, true);
  sort(std::vector<int32_t>(64, -1), 32, 2, 4);
  sort({}, 0, 2, 5);
  sort(draw_ids(40, 60000, 1), 20, 2, 60000);  // counts do not fit into shared memory
}

TEST(slots_sorted_by_many_blocks) {
  sort(draw_ids(4100, 40, 5), 2050, 2, 40);
  sort(std::vector<int32_t>(4099, 1), 4099, 1, 3);
  sort(draw_ids(10000, 2000, 6), 5000, 2, 2000, true);
}

TEST(slots_sorted_in_several_orders) {
  in_several_orders([](const char*) {
    sort(draw_ids(150, 11, 8), 50, 3, 11);
    sort(draw_ids(4200, 5, 9), 2100, 2, 5);
  });
}

template <class T>
void check_moves(int dim, int shift) {
  using C = device::Compute<T>;
  constexpr int kTokens = 9, kChoices = 3, kSlots = kTokens * kChoices, kExperts = 5;
  const DType dtype = sizeof(T) == 8 ? DType::f64 : sizeof(T) == 4 ? DType::f32 : DType::bf16;
  const auto ids = draw_ids(kSlots, kExperts, dim);
  const Sorted s = sort(ids, kTokens, kChoices, kExperts);
  const int64_t x_row = dim + 2 * shift;
  Buffer<T> x(kTokens * x_row, shift), y(int64_t(kSlots) * dim, shift), back(int64_t(kTokens) * dim, shift);
  Integers draw(dim);
  for (int64_t i = 0; i < x.count(); ++i) x.set(i, draw(-8, 8));
  PermuteProblem p;
  p.dtype = dtype;
  p.slots = kSlots;
  p.k = kChoices;
  p.dim = dim;
  p.experts = kExperts;
  p.x = x.raw();
  p.x_row = x_row;
  p.order = s.order.get();
  p.offsets = s.offsets.get();
  p.y = y.raw();
  run_within({x.extent("x"), s.order.extent("order"), s.offsets.extent("offsets"), y.extent("y", true)}, "permute",
             [&] { return device::permute_rows(p, nullptr); });
  for (int i = 0; i < kSlots; ++i)
    for (int d = 0; d < dim; ++d) {
      const double want = i < s.offsets[kExperts - 1] ? x.value(s.order[i] / kChoices * x_row + d) : 0;
      CHECK(y.value(i * dim + d) == want, dim, ": place ", i, ", ", d, ": ", y.value(i * dim + d));
    }

  Buffer<C> weights(kSlots);
  for (int a = 0; a < kSlots; ++a)
    if (s.inverse[a] >= 0) weights.set(a, draw(-3, 3));  // others stay NaN
  UnpermuteProblem u;
  u.dtype = dtype;
  u.tokens = kTokens;
  u.k = kChoices;
  u.dim = dim;
  u.slots = kSlots;
  u.y = y.raw();
  u.y_row = dim;
  u.inverse = s.inverse.get();
  u.out = back.raw();
  for (bool weighted : {true, false}) {
    u.weights = weighted ? weights.raw() : nullptr;
    run_within({y.extent("y"), weights.extent("weights"), s.inverse.extent("inverse"), back.extent("out", true)},
               "unpermute", [&] { return device::unpermute_rows(u, nullptr); });
    for (int t = 0; t < kTokens; ++t)
      for (int d = 0; d < dim; ++d) {
        double want = 0;
        for (int a = t * kChoices; a < (t + 1) * kChoices; ++a)
          if (s.inverse[a] >= 0) want += (weighted ? weights.value(a) : 1) * x.value(t * x_row + d);
        CHECK(back.value(t * dim + d) == want, dim, ": token ", t, ", ", d, ": ", back.value(t * dim + d));
      }
  }
}

TEST(rows_moved) {
  for (int dim : {1, 8, 30, 264})
    for (int shift : {0, 1}) {
      check_moves<bf16>(dim, shift);
      check_moves<float>(dim, shift);
      check_moves<double>(dim, shift);
    }
}

// No index leads outside.
TEST(rows_of_any_index) {
  Buffer<float> x(8), y(6 * 4), out(3 * 4);
  Buffer<int32_t> order(6), offsets(1), inverse(6);
  order.fill({-1, 6, INT32_MAX, 1, INT32_MIN, 3});
  offsets.fill({7});
  inverse.fill({-1, 6, INT32_MAX, -2, INT32_MIN, 1});
  for (int i = 0; i < 8; ++i) x[i] = 1;
  for (int i = 0; i < 24; ++i) y[i] = 1;
  PermuteProblem p;
  p.slots = 6;
  p.k = 3;
  p.dim = p.x_row = 4;
  p.experts = 1;
  p.x = x.raw();
  p.order = order.get();
  p.offsets = offsets.get();
  p.y = y.raw();
  run_within({x.extent("x"), order.extent("order"), offsets.extent("offsets"), y.extent("y", true)}, "permute",
             [&] { return device::permute_rows(p, nullptr); });
  for (int i = 0; i < 24; ++i) CHECK(y[i] == (order[i / 4] == 1 || order[i / 4] == 3 ? 1 : 0), i, ": ", y[i]);
  UnpermuteProblem u;
  u.tokens = 3;
  u.k = 2;
  u.dim = u.y_row = 4;
  u.slots = 6;
  u.y = y.raw();
  u.inverse = inverse.get();
  u.out = out.raw();
  run_within({y.extent("y"), inverse.extent("inverse"), out.extent("out", true)}, "unpermute",
             [&] { return device::unpermute_rows(u, nullptr); });
  for (int i = 0; i < 12; ++i) CHECK(out[i] == 0, i, ": ", out[i]);
}

}  // namespace
}  // namespace effops::test
