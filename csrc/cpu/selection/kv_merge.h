// Merges evicted keys and values into kept ones. First every evicted key finds its nearest kept one: a task has a block
// of entries, and visits the kept keys tile by tile through a GEMM of unit vectors, so that what an entry finds depends
// on nothing but its own key and the kept ones. Then a task has a few columns of a sequence's head, sums what is merged
// in the order of the entries and moves the kept rows forward: columns do not meet, so that it can work in place.
#pragma once

#include <cmath>

#include "common/kv_merge_problem.h"
#include "common/parallel.h"
#include "common/scratch.h"
#include "cpu/gemm/gemm.h"

namespace effops::cpu::EFFOPS_ISA {

inline constexpr int64_t kMergeEntries = 128, kMergeKept = 64, kMergeColumns = 16;
inline constexpr int64_t kMergeSerialWork = 1 << 14;  // below this threads cost more than they give

// Kept entries of a head: those before the first negative one.
inline int64_t kept_count(const KvMergeProblem& p, int64_t b, int64_t g) {
  int64_t low = 0, high = p.kept.count;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    p.entry(b, g, middle) >= 0 ? low = middle + 1 : high = middle;
  }
  return low;
}

// A row over its norm, or zeros where that is not usable.
template <class T, class C>
void unit_row(const T* from, int64_t stride, int64_t dim, C* to) {
  copy_row(from, stride, dim, to);
  C largest = 0, squares = 0;
  for (int64_t d = 0; d < dim; ++d) largest = std::max(largest, std::abs(to[d]));
  for (int64_t d = 0; d < dim; ++d) {
    const C x = to[d] / largest;
    squares += x * x;
  }
  const C norm = usable_norm(largest * std::sqrt(squares));
  for (int64_t d = 0; d < dim; ++d) to[d] = norm > 0 ? to[d] / norm : C(0);
}

template <class T>
class NearestKept {
  using V = vec_of<T>;
  using C = typename V::scalar;
  using P = FmaProduct<V, C>;
  using G = GemmTile<P>;

 public:
  NearestKept(const KvMergeProblem& p, int64_t b, int64_t g) : p_(p), b_(b), g_(g), kept_(kept_count(p, b, g)) {
    const size_t bytes = carve(Carver());
    carve(Carver(thread_scratch(Scratch::task, bytes)));
  }

  // Of the entries [first, last).
  void run(int64_t first, int64_t last) {
    int32_t* const nearest = p_.nearest + p_.at(b_, g_, 0);
    C* const similarity = reinterpret_cast<C*>(p_.similarity) + p_.at(b_, g_, 0);
    std::fill(nearest + first, nearest + last, -1);
    std::fill(similarity + first, similarity + last, C(0));
    const int64_t end = std::min(last, p_.len(b_));
    int64_t evicted = 0, i = first_kept(first);
    for (int64_t j = first; j < end; ++j) {
      if (i < kept_ && p_.entry(b_, g_, i) == j) {
        nearest[j] = static_cast<int32_t>(i++);
        similarity[j] = 1;
      } else {
        entry_[evicted++] = j;
      }
    }
    if (evicted == 0 || kept_ == 0 || p_.mode == KvMerge::none) return;
    find(evicted);
    for (int64_t e = 0; e < evicted; ++e) {
      similarity[entry_[e]] = best_[e];
      nearest[entry_[e]] = static_cast<double>(best_[e]) >= p_.least ? place_[e] : -1;
    }
  }

 private:
  size_t carve(Carver c) {
    entry_ = c.take<int64_t>(kMergeEntries);
    place_ = c.take<int32_t>(kMergeEntries);
    best_ = c.take<C>(kMergeEntries);
    evicted_ = c.take<C>(kMergeEntries * p_.k_dim);
    stage_ = c.take<C>(kMergeKept * p_.k_dim);
    panels_ = c.take<C>(G::padded(kMergeKept) * p_.k_dim);
    scores_ = c.take<C>(kMergeEntries * G::padded(kMergeKept));
    return c.used();
  }

  // The first of the kept entries at or past a slot.
  int64_t first_kept(int64_t slot) const {
    int64_t low = 0, high = kept_;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      p_.entry(b_, g_, middle) < slot ? low = middle + 1 : high = middle;
    }
    return low;
  }

  void take_unit(int64_t slot, C* to) const {
    const TensorView4& k = p_.k;
    unit_row(reinterpret_cast<const T*>(k.data) + b_ * k.batch + slot * k.token + g_ * k.head, k.dim, p_.k_dim, to);
  }

  void find(int64_t evicted) {
    constexpr int64_t kStride = (kMergeKept + G::NR - 1) / G::NR * G::NR;
    for (int64_t e = 0; e < evicted; ++e) take_unit(entry_[e], evicted_ + e * p_.k_dim);
    std::fill(best_, best_ + evicted, -std::numeric_limits<C>::infinity());
    for (int64_t first = 0; first < kept_; first += kMergeKept) {
      const int64_t n = std::min(kMergeKept, kept_ - first);
      for (int64_t i = 0; i < n; ++i) take_unit(p_.entry(b_, g_, first + i), stage_ + i * p_.k_dim);
      const C* rows[kMergeKept];
      for (int64_t i = 0; i < n; ++i) rows[i] = stage_ + i * p_.k_dim;
      pack_transposed<P>(rows, n, p_.k_dim, panels_);
      gemm<P>(evicted, n, p_.k_dim, evicted_, p_.k_dim, panels_, scores_, kStride, false);
      for (int64_t e = 0; e < evicted; ++e) {
        const C* const score = scores_ + e * kStride;
        for (int64_t i = 0; i < n; ++i) {
          if (!(score[i] > best_[e])) continue;
          best_[e] = score[i];
          place_[e] = static_cast<int32_t>(first + i);
        }
      }
    }
  }

  const KvMergeProblem& p_;
  int64_t b_, g_, kept_;
  int64_t* entry_;  // slots of a block's evicted entries
  int32_t* place_;
  C *best_, *evicted_, *stage_, *panels_, *scores_;
};

// The columns [first, first + columns) of a head's keys or values.
template <class T>
void merge_columns(const KvMergeProblem& p, const TensorView4& x, int64_t b, int64_t g, int64_t first,
                   int64_t columns) {
  using C = typename vec_of<T>::scalar;
  const int64_t kept = kept_count(p, b, g), len = p.len(b);
  C* sums = nullptr;
  int32_t* counts = nullptr;
  const auto carve = [&](Carver c) {
    sums = c.take<C>(kept * kMergeColumns);
    counts = c.take<int32_t>(kept);
    return c.used();
  };
  const size_t bytes = carve(Carver());
  carve(Carver(thread_scratch(Scratch::task, bytes)));
  std::fill(sums, sums + kept * kMergeColumns, C(0));
  std::fill(counts, counts + kept, 0);
  const auto row = [&](int64_t slot) {
    return reinterpret_cast<T*>(x.data) + b * x.batch + slot * x.token + g * x.head + first * x.dim;
  };
  const int32_t* const nearest = p.nearest + p.at(b, g, 0);
  const C* const similarity = reinterpret_cast<const C*>(p.similarity) + p.at(b, g, 0);
  C evicted[kMergeColumns], own[kMergeColumns];
  for (int64_t j = 0, i = 0; j < len && p.mode != KvMerge::none; ++j) {
    if (i < kept && p.entry(b, g, i) == j) {
      ++i;
      continue;
    }
    const int64_t to = nearest[j];
    if (to < 0) continue;
    copy_row(row(j), x.dim, columns, evicted);
    copy_row(row(p.entry(b, g, to)), x.dim, columns, own);
    C* const sum = sums + to * kMergeColumns;
    for (int64_t d = 0; d < columns; ++d) sum[d] += merged_part(p.mode, evicted[d], own[d], similarity[j]);
    ++counts[to];
  }
  for (int64_t i = 0; i < kept; ++i) {
    const T* const from = row(p.entry(b, g, i));
    T* const to = row(i);
    for (int64_t d = 0; d < columns; ++d) {
      T merged = from[d * x.dim];
      if (counts[i] > 0) {
        const C mean = to_float(merged) + sums[i * kMergeColumns + d] / static_cast<C>(counts[i] + 1);
        if constexpr (sizeof(T) == sizeof(C)) {
          merged = mean;
        } else {
          merged = from_float<T>(mean);
        }
      }
      to[d * x.dim] = merged;
    }
  }
}

template <class T>
void kv_merge_typed(const KvMergeProblem& p, const Parallel& parallel) {
  const int64_t all = p.batch * p.heads, blocks = (p.slots + kMergeEntries - 1) / kMergeEntries;
  parallel.for_each(all * blocks, all * p.slots * p.kept.count > kMergeSerialWork, [&](int64_t i) {
    const int64_t first = i % blocks * kMergeEntries, head = i / blocks;
    NearestKept<T>(p, head / p.heads, head % p.heads).run(first, std::min(p.slots, first + kMergeEntries));
  });
  const auto parts = [](int64_t dim) { return (dim + kMergeColumns - 1) / kMergeColumns; };
  const int64_t own = parts(p.k_dim), each = own + parts(p.v_dim);
  parallel.for_each(all * each, all * p.slots * (p.k_dim + p.v_dim) > kMergeSerialWork, [&](int64_t i) {
    const int64_t part = i % each, head = i / each;
    const bool keys = part < own;
    const int64_t first = (keys ? part : part - own) * kMergeColumns;
    merge_columns<T>(p, keys ? p.k : p.v, head / p.heads, head % p.heads, first,
                     std::min(kMergeColumns, (keys ? p.k_dim : p.v_dim) - first));
  });
}

}  // namespace effops::cpu::EFFOPS_ISA
