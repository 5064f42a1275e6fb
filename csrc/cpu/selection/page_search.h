// The tokens of the pages whose bounds are the largest, list by list. Floor: the bounds of all pages are read once a
// list, 2 * D elements a page; 4 * D operations a page and query head.
#pragma once

#include "common/page_bounds.h"
#include "common/parallel.h"
#include "common/scratch.h"
#include "cpu/selection/list.h"
#include "cpu/simd/simd.h"

namespace effops::cpu::EFFOPS_ISA {

// Float32 rows have a whole number of kBoundSums channels: zeros behind the last.
inline int64_t bound_width(int64_t dim) { return (dim + kBoundSums - 1) / kBoundSums * kBoundSums; }

// The working memory of a list.
struct PageScratch {
  float *q, *low, *high;  // [rows, width], [width], [width]
  int16_t* coarse;
  int32_t *fine, *equals, *chosen;

  PageScratch(const PageSearchProblem& p, int64_t candidates, Carver& memory)
      : q(memory.take<float>(p.rows() * bound_width(p.dim))),
        low(memory.take<float>(bound_width(p.dim))),
        high(memory.take<float>(bound_width(p.dim))),
        coarse(memory.take<int16_t>(candidates + 64)),
        fine(memory.take<int32_t>(candidates)),
        equals(memory.take<int32_t>(candidates)),
        chosen(memory.take<int32_t>(p.count)) {}
};

// A row as float32: in place, or the first `dim` numbers of `stage`.
template <class T>
const float* float_row(const T* from, int64_t step, int64_t dim, float* stage) {
  int64_t c = 0;
  if constexpr (!std::is_same_v<T, double>) {
    if (step == 1) {
      if constexpr (std::is_same_v<T, float>)
        if (dim % kBoundSums == 0) return from;
      for (; c + Vec::width <= dim; c += Vec::width) Vec::load(from + c).store(stage + c);
    }
  }
  for (; c < dim; ++c) stage[c] = static_cast<float>(to_float(from[c * step]));
  return stage;
}

// Without fmadd: not every instruction set has it (see kBoundSums).
inline float page_bound(const float* q, const float* low, const float* high, int64_t width) {
  constexpr int W = Vec::width, kVecs = kBoundSums / W;
  Vec sums[kVecs];
  for (Vec& sum : sums) sum = Vec::zero();
  for (int64_t c = 0; c < width; c += kBoundSums) {
#pragma GCC unroll 4
    for (int i = 0; i < kVecs; ++i) {
      const Vec x = Vec::load(q + c + i * W);
      sums[i] = sums[i] + max(x * Vec::load(low + c + i * W), x * Vec::load(high + c + i * W));
    }
  }
  for (int n = kVecs / 2; n > 0; n /= 2)
    for (int i = 0; i < n; ++i) sums[i] = sums[i] + sums[i + n];
  return reduce_add(sums[0]);  // by halves, too
}

template <class T>
void page_keys(const PageSearchProblem& p, int64_t b, int64_t list, const SelectionRange& r, const PageScratch& s) {
  const int64_t width = bound_width(p.dim), head = p.first_head(list), g = head / p.group();
  std::fill(s.q, s.q + p.rows() * width, 0.0f);
  std::fill(s.low, s.low + width, 0.0f);
  std::fill(s.high, s.high + width, 0.0f);
  for (int64_t row = 0; row < p.rows(); ++row) {
    const T* const q = reinterpret_cast<const T*>(p.q.data) + b * p.q.batch + (head + row) * p.q.head;
    for (int64_t c = 0; c < p.dim; ++c) s.q[row * width + c] = static_cast<float>(to_float(q[c * p.q.dim]));
  }
  const auto of = [&](const TensorView4& x, int64_t page) {
    return reinterpret_cast<const T*>(x.data) + b * x.batch + page * x.token + g * x.head;
  };
  for (int64_t i = 0; i < r.candidates(); ++i) {
    const float* const low = float_row(of(p.low, r.first + i), p.low.dim, p.dim, s.low);
    const float* const high = float_row(of(p.high, r.first + i), p.high.dim, p.dim, s.high);
    float best = page_bound(s.q, low, high, width);
    for (int64_t row = 1; row < p.rows(); ++row) best = std::max(best, page_bound(s.q + row * width, low, high, width));
    s.fine[i] = order_key(static_cast<int32_t>(float_to_bits(best)));
    s.coarse[i] = static_cast<int16_t>(s.fine[i] >> 16);
  }
}

template <class T>
void page_list(const PageSearchProblem& p, int64_t b, int64_t list, int32_t* to) {
  const SelectionRange r = range_of(p, b);
  Carver size;
  PageScratch(p, r.candidates(), size);
  Carver memory(thread_scratch(Scratch::task, size.used()));
  const PageScratch s(p, r.candidates(), memory);
  const int32_t* const chosen_end = write_list(r, s.chosen, [&](int32_t* free) {
    page_keys<T>(p, b, list, r, s);
    return write_top({s.coarse, s.fine, r.candidates()}, r.free, r.first, s.equals, free);
  });
  int32_t* const end = to + p.count * p.page;
  const int64_t length = p.length(b);
  for (const int32_t* page = s.chosen; page < chosen_end; ++page) {
    const int64_t first = *page * p.page, tokens = std::min(p.page, length - first);
    std::iota(to, to + tokens, static_cast<int32_t>(first));
    to += tokens;
  }
  std::fill(to, end, -1);
}

template <class T>
void page_search_typed(const PageSearchProblem& p, const Parallel& parallel) {
  const int64_t lists = p.lists();
  parallel.for_each(p.batch * lists, p.batch * lists * p.pages * p.dim > 65536,
                    [&](int64_t i) { page_list<T>(p, i / lists, i % lists, p.indices + i * p.count * p.page); });
}

}  // namespace effops::cpu::EFFOPS_ISA
