// grouped, grouped_gradient and experts. The products of grouped are exact in float32, so that one rounding is all the
// error there may be; those of experts are followed in float64.
#include <algorithm>

#include "check.h"
#include "common/grouped_plan.h"
#include "kernels_under_test.h"
#include "tensor.h"
#include "threads.h"

namespace effops::test {
namespace {

using Sizes = std::vector<int32_t>;

Sizes ends_of(const Sizes& rows) {
  Sizes ends;
  for (int32_t n : rows) ends.push_back((ends.empty() ? 0 : ends.back()) + n);
  return ends;
}

struct GroupedCase {
  Sizes rows;  // of each group
  int64_t past, in, out;
  WeightLayout layout = WeightLayout::rows;
  bool bias = false;
  Sizes in_sizes = {}, out_sizes = {};
};

// A weight [groups, in, out] in either layout: [groups, out, in] memory is seen transposed.
struct Weight {
  Weight(DType dtype, int64_t groups, int64_t in, int64_t out, WeightLayout layout)
      : by_rows(layout == WeightLayout::rows),
        memory(dtype, {1, groups, by_rows ? out : in, by_rows ? in : out}, Layout::gapped) {}
  double get(int64_t g, int64_t k, int64_t n) const { return memory.get(0, g, by_rows ? n : k, by_rows ? k : n); }
  void set(int64_t g, int64_t k, int64_t n, double v) { memory.set(0, g, by_rows ? n : k, by_rows ? k : n, v); }
  void place(GroupedProblem& p) const {
    p.layout = by_rows ? WeightLayout::rows : WeightLayout::columns;
    p.w = memory.data();
    p.w_group = memory.stride(1);
    p.w_in = by_rows ? 1 : memory.stride(2);
    p.w_out = by_rows ? memory.stride(2) : 1;
  }

  bool by_rows;
  Tensor memory;
};

// Where a group has fewer features than there are, the rest stays NaN.
void check_grouped(const GroupedCase& c, DType dtype) {
  const int64_t groups = static_cast<int64_t>(c.rows.size());
  const Sizes ends = ends_of(c.rows);
  const int64_t rows = ends.back() + c.past;
  Random random(static_cast<uint32_t>(rows * 100 + c.in * 10 + c.out));
  Tensor x(dtype, {1, 1, rows, c.in}, Layout::gapped), y(dtype, {1, 1, rows, c.out}, Layout::gapped);
  Tensor bias(dtype, {1, 1, groups, c.out});
  Weight w(dtype, groups, c.in, c.out, c.layout);
  auto in_of = [&](int64_t g) { return c.in_sizes.empty() ? c.in : c.in_sizes[g]; };
  auto out_of = [&](int64_t g) { return c.out_sizes.empty() ? c.out : c.out_sizes[g]; };
  bias.fill(random);
  for (int64_t g = 0, r = 0; g < groups; ++g) {
    for (; r < ends[g]; ++r)
      for (int64_t k = 0; k < in_of(g); ++k) x.set(0, 0, r, k, random.value());
    for (int64_t k = 0; k < in_of(g); ++k)
      for (int64_t n = 0; n < out_of(g); ++n) w.set(g, k, n, random.value());
  }
  for (Tensor* t : {&x, &w.memory, &bias}) t->freeze();
  const List<int32_t> offsets(ends), in_sizes(c.in_sizes), out_sizes(c.out_sizes);
  GroupedProblem p;
  p.dtype = dtype;
  p.rows = rows;
  p.in = c.in;
  p.out = c.out;
  p.groups = groups;
  p.offsets = offsets.get();
  p.x = x.data();
  p.x_row = x.stride(2);
  w.place(p);
  p.bias = c.bias ? bias.data() : nullptr;
  p.in_sizes = in_sizes.get();
  p.out_sizes = out_sizes.get();
  p.y = y.data();
  p.y_row = y.stride(2);
  for (const bool invariant : {false, true}) {
    p.invariant = invariant;
    kernels_under_test().grouped(p, std_threads(3));
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t g = std::upper_bound(ends.begin(), ends.end(), static_cast<int32_t>(r)) - ends.begin();
      for (int64_t n = 0; n < c.out; ++n) {
        double want = 0;
        if (g < groups && n < out_of(g)) {
          want = c.bias ? bias.get(0, 0, g, n) : 0;
          for (int64_t k = 0; k < in_of(g); ++k) want += x.get(0, 0, r, k) * w.get(g, k, n);
        }
        const double got = y.get(0, 0, r, n), limit = dtype == DType::f32 ? 0 : std::abs(want) * roundoff(dtype);
        CHECK(near(got, want, limit), "y[", r, ",", n, "] ", got, " for ", want, " ", name_of(dtype), " in ", c.in,
              " out ", c.out, " layout ", int(c.layout), " invariant ", invariant);
      }
    }
    CHECK(y.gaps_intact(), "bytes between the rows of y were written");
  }
}

void check_grouped(const GroupedCase& c) {
  for (DType dtype : kDTypes)
    for (WeightLayout layout : {WeightLayout::rows, WeightLayout::columns}) {
      GroupedCase own = c;
      own.layout = layout;
      check_grouped(own, dtype);
    }
}

TEST(grouped_rows) {
  check_grouped({{0, 1, 2, 3, 4, 0, 5, 7}, 2, 37, 21, {}, true});
  check_grouped({{8, 13, 47, 0, 48}, 0, 19, 35, {}, true});
  check_grouped({{0, 0}, 3, 19, 35, {}, true});
}

TEST(grouped_features) {
  for (int64_t out : {0, 1, 2, 15, 16, 17, 31, 32, 33, 65, 130}) check_grouped({{3, 0, 50}, 1, 19, out, {}, true});
}

TEST(grouped_depths) {
  for (int64_t in : {0, 1, 2, 7, 15, 16, 17, 31, 32, 33, 64, 65}) check_grouped({{1, 6, 49}, 1, in, 18});
}

TEST(grouped_sizes) { check_grouped({{3, 2, 0, 50, 4}, 1, 33, 40, {}, true, {33, 0, 5, 20, 1}, {40, 3, 9, 17, 0}}); }

void check_gradient(const Sizes& rows, int64_t in, int64_t out, bool sizes, DType dtype) {
  const Sizes ends = ends_of(rows);
  const int64_t groups = static_cast<int64_t>(rows.size()), all = ends.back() + 1;
  Random random(static_cast<uint32_t>(all * 100 + in * 10 + out));
  Tensor x(dtype, {1, 1, all, in}, Layout::gapped), dy(dtype, {1, 1, all, out}, Layout::gapped);
  Tensor dw(dtype, {1, groups, in, out});
  for (Tensor* t : {&x, &dy}) {
    t->fill(random);
    t->freeze();
  }
  Sizes in_sizes, out_sizes;
  for (int64_t g = 0; sizes && g < groups; ++g) {
    in_sizes.push_back(static_cast<int32_t>(random.between(0, in)));
    out_sizes.push_back(static_cast<int32_t>(random.between(0, out)));
  }
  const List<int32_t> offsets(ends), ins(in_sizes), outs(out_sizes);
  GroupedGradientProblem p;
  p.dtype = dtype;
  p.rows = all;
  p.in = in;
  p.out = out;
  p.groups = groups;
  p.offsets = offsets.get();
  p.x = x.data();
  p.dy = dy.data();
  p.x_row = x.stride(2);
  p.dy_row = dy.stride(2);
  p.in_sizes = ins.get();
  p.out_sizes = outs.get();
  p.dw = dw.data();
  kernels_under_test().grouped_gradient(p, std_threads(3));
  for (int64_t g = 0; g < groups; ++g)
    for (int64_t k = 0; k < in; ++k)
      for (int64_t n = 0; n < out; ++n) {
        double want = 0;
        if (!sizes || (k < in_sizes[g] && n < out_sizes[g]))
          for (int64_t r = ends[g] - rows[g]; r < ends[g]; ++r) want += x.get(0, 0, r, k) * dy.get(0, 0, r, n);
        const double got = dw.get(0, g, k, n), limit = dtype == DType::f32 ? 0 : std::abs(want) * roundoff(dtype);
        CHECK(near(got, want, limit), "dw[", g, ",", k, ",", n, "] ", got, " for ", want, " ", name_of(dtype), " in ",
              in, " out ", out, " sizes ", sizes);
      }
}

TEST(grouped_gradients) {
  for (DType dtype : kDTypes)
    for (const bool sizes : {false, true}) {
      check_gradient({0, 3, 1, 0, 34}, 37, 21, sizes, dtype);
      check_gradient({17}, 1, 33, sizes, dtype);
      check_gradient({2, 2}, 64, 65, sizes, dtype);
    }
}

// Rows of a weight in the order of panels: sixteen gates beside their up values, or 32 features.
Tensor in_panels(const Weight& w, DType dtype, int64_t groups, int64_t in, int64_t out, bool gated) {
  const int64_t features = gated ? out / 2 : out, each = gated ? 16 : 32, panels = (features + each - 1) / each;
  const int64_t pack = dtype == DType::bf16 ? 2 : 1, steps = (in + pack - 1) / pack;
  Tensor t(dtype, {groups, panels, steps, 32 * pack});
  for (int64_t g = 0; g < groups; ++g)
    for (int64_t i = 0; i < panels; ++i)
      for (int64_t s = 0; s < steps; ++s)
        for (int64_t e = 0; e < 32 * pack; ++e) {
          const int64_t j = e / pack, k = s * pack + e % pack, feature = i * each + j % each;
          const bool there = k < in && feature < features;
          t.set(g, i, s, e, there ? w.get(g, k, feature + (gated && j >= 16 ? features : 0)) : 0);
        }
  return t;
}

double relu2(double g, double u) { return g > 0 ? g * g * u : 0; }

struct ExpertsCase {
  int64_t tokens, k, experts, in, hidden;
  WeightLayout layout;
  bool gated, interleaved;
};

void check_experts(const ExpertsCase& c, DType dtype) {
  Random random(static_cast<uint32_t>(c.tokens * 100 + c.in * 10 + c.hidden));
  const int64_t up = c.gated ? 2 * c.hidden : c.hidden, slots = c.tokens * c.k;
  const DType wide = compute_type(dtype);
  Tensor x(dtype, {1, 1, c.tokens, c.in}, Layout::gapped), out(dtype, {1, 1, c.tokens, c.in});
  Tensor weights(wide, {1, 1, c.tokens, c.k}), bias_up(dtype, {1, 1, c.experts, up});
  Tensor bias_down(dtype, {1, 1, c.experts, c.in});
  const bool panels = c.layout == WeightLayout::panels;
  Weight first(dtype, c.experts, c.in, up, c.layout), second(dtype, c.experts, c.hidden, c.in, c.layout);
  for (Tensor* t : {&x, &weights, &bias_up, &bias_down, &first.memory, &second.memory}) t->fill(random);
  Tensor first_panels, second_panels;
  if (panels) {
    first_panels = in_panels(first, dtype, c.experts, c.in, up, c.gated);
    second_panels = in_panels(second, dtype, c.experts, c.hidden, c.in, false);
  }
  for (Tensor* t : {&x, &weights, &bias_up, &bias_down, &first.memory, &second.memory}) t->freeze();
  Sizes ids, ends, order;
  for (int64_t i = 0; i < slots; ++i) ids.push_back(static_cast<int32_t>(random.between(-1, c.experts - 1)));
  for (int32_t e = 0; e < c.experts; ++e) {
    for (int32_t i = 0; i < slots; ++i)
      if (ids[i] == e) order.push_back(i);
    ends.push_back(static_cast<int32_t>(order.size()));
  }
  for (int32_t i = 0; i < slots; ++i)
    if (ids[i] < 0) order.push_back(i);
  const List<int32_t> offsets(ends), places(order);
  ExpertsProblem p;
  for (GroupedProblem* g : {&p.gate_up, &p.down}) {
    g->dtype = dtype;
    g->rows = slots;
    g->groups = c.experts;
    g->offsets = offsets.get();
    g->order = places.get();
    g->k = c.k;
  }
  p.gate_up.in = p.down.out = c.in;
  p.gate_up.out = up;
  p.down.in = c.hidden;
  p.gate_up.x = x.data();
  p.gate_up.x_row = x.stride(2);
  p.gate_up.activation = Activation::relu2;
  p.gate_up.gated = c.gated;
  p.gate_up.interleaved = c.interleaved;
  p.gate_up.bias = bias_up.data();
  p.down.bias = bias_down.data();
  first.place(p.gate_up);
  second.place(p.down);
  if (panels) {
    p.gate_up.layout = p.down.layout = WeightLayout::panels;
    p.gate_up.w = first_panels.data();
    p.down.w = second_panels.data();
    p.gate_up.w_group = first_panels.stride(0);
    p.down.w_group = second_panels.stride(0);
  }
  p.tokens = c.tokens;
  p.weights = weights.data();
  p.out = out.data();
  kernels_under_test().experts(p, std_threads(3));

  const double u = roundoff(dtype), w = roundoff(wide) * 8 * static_cast<double>(c.in + c.hidden + c.k);
  std::vector<double> want(c.in), size(c.in), a(c.hidden), a_off(c.hidden);
  for (int64_t t = 0; t < c.tokens; ++t) {
    std::fill(want.begin(), want.end(), 0);
    std::fill(size.begin(), size.end(), 0);
    for (int64_t j = 0; j < c.k; ++j) {
      const int32_t e = ids[t * c.k + j];
      if (e < 0) continue;
      auto value = [&](int64_t feature) {
        double sum = bias_up.get(0, 0, e, feature);
        for (int64_t i = 0; i < c.in; ++i) sum += x.get(0, 0, t, i) * first.get(e, i, feature);
        return sum;
      };
      for (int64_t f = 0; f < c.hidden; ++f) {
        const double gate = value(c.interleaved ? 2 * f : f);
        const double other = !c.gated ? 1 : value(c.interleaved ? 2 * f + 1 : c.hidden + f);
        a[f] = relu2(gate, other);
        a_off[f] = std::abs(a[f]) * (u + w);
      }
      const double weight = weights.get(0, 0, t, j);
      for (int64_t n = 0; n < c.in; ++n) {
        double y = bias_down.get(0, 0, e, n), off = std::abs(y) * w;
        for (int64_t f = 0; f < c.hidden; ++f) {
          y += a[f] * second.get(e, f, n);
          off += std::abs(second.get(e, f, n)) * (a_off[f] + std::abs(a[f]) * w);
        }
        want[n] += weight * y;
        size[n] += std::abs(weight) * (off + std::abs(y) * w);
      }
    }
    for (int64_t n = 0; n < c.in; ++n) {
      const double got = out.get(0, 0, t, n);
      CHECK(near(got, want[n], std::abs(want[n]) * u + 2 * size[n]), "out[", t, ",", n, "] ", got, " for ", want[n],
            " ", name_of(dtype), " tokens ", c.tokens, " in ", c.in, " hidden ", c.hidden, " layout ", int(c.layout),
            " gated ", c.gated, " interleaved ", c.interleaved);
    }
  }
}

TEST(experts) {
  for (DType dtype : {DType::f32, DType::bf16, DType::f64})  // float16 has no room for squares of sums
    for (WeightLayout layout : {WeightLayout::rows, WeightLayout::columns, WeightLayout::panels})
      for (int kind = 0; kind < 3; ++kind) {
        const bool gated = kind < 2, interleaved = kind == 1;
        if (interleaved && layout == WeightLayout::panels) continue;  // the packing sets them apart
        check_experts({1, 2, 4, 5, 3, layout, gated, interleaved}, dtype);
        check_experts({5, 3, 2, 33, 17, layout, gated, interleaved}, dtype);
        check_experts({70, 2, 2, 16, 40, layout, gated, interleaved}, dtype);
        check_experts({0, 2, 3, 16, 8, layout, gated, interleaved}, dtype);
      }
}

}  // namespace
}  // namespace effops::test
