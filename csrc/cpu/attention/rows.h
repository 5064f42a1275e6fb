// The rows of one task: (token, query head) pairs that share a KV head, token-major. Knows where
// each row's query and output lie, which keys it may see, how it finishes, and how partial results
// of splits join.
#pragma once

#include <cmath>
#include <limits>

#include "common/attention_plan.h"
#include "cpu/simd/math.h"

namespace effops::cpu::EFFOPS_ISA {

template <class C>
inline constexpr C kNegInf = -std::numeric_limits<C>::infinity();

template <class T>
struct Rows {
  using V = vec_of<T>;
  using C = typename V::scalar;

  const AttentionProblem& p;
  Sequence s;
  int64_t index, sequence, kv_head, group;  // sequence: batch index in q, out and lse

  Rows(const AttentionProblem& problem, const AttentionTask& task)
      : p(problem),
        s(sequence_of(problem, task.sequence, task.kv_head)),
        index(task.sequence),
        sequence(p.cu_q ? 0 : index),
        kv_head(task.kv_head),
        group(problem.group()) {}

  int64_t position(int64_t row) const { return s.position(row / group); }
  Positions positions(int64_t row_begin, int64_t row_end) const {
    return s.positions(row_begin / group, (row_end - 1) / group);
  }
  int64_t token(int64_t row) const { return s.q_begin + row / group; }
  int64_t head(int64_t row) const { return kv_head * group + row % group; }

  template <class E = T>
  E* at(const TensorView4& view, int64_t row) const {
    return reinterpret_cast<E*>(view.data) + sequence * view.batch + token(row) * view.token + head(row) * view.head;
  }
  C* lse_at(const RowView& view, int64_t row) const {
    return reinterpret_cast<C*>(view.data) + sequence * view.batch + token(row) * view.token + head(row) * view.head;
  }

  // Writes out = o / l and lse from an unnormalised row in memory order.
  void finish(int64_t row, const C* o, C m, C l) const {
    C factor = l == 0 ? C(0) : C(1) / l;
    C lse = l == 0 ? kNegInf<C> : m + std::log(l);
    if (p.sink_logits) {
      const C sink = p.sink_logits[head(row)];
      const C top = m > sink ? m : sink;
      if (top > kNegInf<C>) {
        const C weight = l == 0 ? C(0) : std::exp(m - top);
        const C total = l * weight + std::exp(sink - top);
        factor = weight / total;
        lse = top + std::log(total);
      }
    }
    *lse_at(p.lse, row) = lse;
    p.wide_out ? write(at<C>(p.out, row), o, factor) : write(at(p.out, row), o, factor);
  }

 private:
  template <class E>
  void write(E* to, const C* o, C factor) const {
    const int64_t dim = p.v_dim, stride = p.out.dim;
    int64_t d = 0;
    if (stride == 1)
      for (; d + V::width <= dim; d += V::width) (V::load(o + d) * V::set1(factor)).store(to + d);
    for (; d < dim; ++d) {
      if constexpr (sizeof(T) == 8) {
        to[d * stride] = o[d] * factor;
      } else {
        to[d * stride] = from_float<E>(o[d] * factor);
      }
    }
  }
};

// What scores are multiplied with, before the softcap where there is one.
inline double score_factor(const AttentionProblem& p) { return p.softcap == 0 ? p.scale : p.scale / p.softcap; }

// softcap * tanh(scores) of scores that score_factor was applied to; nothing without a softcap.
// Writes whole vectors.
template <class V>
inline void cap_scores(const AttentionProblem& p, int64_t count, typename V::scalar* s) {
  if (p.softcap == 0) return;
  const V cap = V::set1(static_cast<typename V::scalar>(p.softcap));
  for (int64_t i = 0; i < count; i += V::width) (cap * tanh(V::load(s + i))).store(s + i);
}

// Both, of plain inner products.
template <class V>
inline void scale_scores(const AttentionProblem& p, int64_t count, typename V::scalar* s) {
  const V factor = V::set1(static_cast<typename V::scalar>(score_factor(p)));
  for (int64_t i = 0; i < count; i += V::width) (V::load(s + i) * factor).store(s + i);
  cap_scores<V>(p, count, s);
}

// -inf for the keys [first, first + keys) that the row may not see.
template <class R, class C>
inline void mask_row(const R& rows, const Visibility& see, int64_t row, int64_t first, int64_t keys, C* s,
                     int64_t stride) {
  const int64_t position = rows.position(row);
  auto hide = [&](int64_t begin, int64_t end) {
    begin = std::max<int64_t>(begin - first, 0);
    end = std::min(end - first, keys);
    for (int64_t j = begin; j < end; ++j) s[j * stride] = kNegInf<C>;
  };
  hide(first, see.start);
  if (see.window != 0) hide(std::max(see.start, see.sinks_end), see.begin_at(position));
  hide(see.end_at(position), first + keys);
  for (int64_t j = std::max(first, see.tree_begin); j < first + keys; ++j)
    if (!tree_allows(see, rows.s, row / rows.group, j - see.tree_begin)) s[(j - first) * stride] = kNegInf<C>;
}

// True when no element of the tile is masked for any row in [row_begin, row_end).
template <class R>
bool tile_is_full(const R& rows, const Visibility& see, int64_t row_begin, int64_t row_end, int64_t first,
                  int64_t keys) {
  const Positions at = rows.positions(row_begin, row_end);
  return first >= see.start && first + keys <= std::min(see.end_at(at.lowest), see.tree_begin) &&
         (see.window == 0 || first >= see.begin_at(at.highest) || first + keys <= see.sinks_end);
}

// A partial row in the workspace: v_dim unnormalised values in memory order, then m and l.
inline int64_t partial_stride(const AttentionProblem& p) { return p.v_dim + 2; }

// A finished row of a task: straight to the output, or kept until the splits join.
template <class T, class C>
void finish_or_keep(const AttentionProblem& p, const AttentionTask& task, const Rows<T>& rows, C* partials, int64_t row,
                    const C* o, C m, C l) {
  if (task.partial < 0) return rows.finish(row, o, m, l);
  C* to = partials + (task.partial + row - task.row_begin) * partial_stride(p);
  std::copy(o, o + p.v_dim, to);
  to[p.v_dim] = m;
  to[p.v_dim + 1] = l;
}

// Joins the splits of a row block in order. `task` is the block's split 0; the others follow it.
template <class T, class C>
void join_splits(const AttentionProblem& p, const AttentionTask& task, const C* partials, C* o) {
  const Rows<T> rows(p, task);
  const int64_t stride = partial_stride(p), block = task.row_end - task.row_begin;
  for (int64_t row = task.row_begin; row < task.row_end; ++row) {
    const C* first = partials + (task.partial + row - task.row_begin) * stride;
    C m = kNegInf<C>, l = 0;
    for (int32_t s = 0; s < task.splits; ++s) m = std::max(m, first[s * block * stride + p.v_dim]);
    std::fill(o, o + p.v_dim, C(0));
    for (int32_t s = 0; s < task.splits; ++s) {
      const C* part = first + s * block * stride;
      if (part[p.v_dim] == kNegInf<C>) continue;
      const C weight = std::exp(part[p.v_dim] - m);
      for (int64_t d = 0; d < p.v_dim; ++d) o[d] += weight * part[d];
      l += weight * part[p.v_dim + 1];
    }
    rows.finish(row, o, m, l);
  }
}

}  // namespace effops::cpu::EFFOPS_ISA
