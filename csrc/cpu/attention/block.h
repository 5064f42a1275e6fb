// The GEMM-shaped loop: a block of query rows against tiles of keys, both products as GEMMs.
#pragma once

#include "common/scratch.h"
#include "cpu/attention/rows.h"
#include "cpu/attention/tile.h"
#include "cpu/gemm/gemm.h"

namespace effops::cpu::EFFOPS_ISA {

// Online softmax of one row of a tile: probabilities to p, the row of o rescaled.
template <class T, class P = product_of<T>, class C = typename P::C>
inline void block_softmax(const C* scores, typename P::Element* p, C& m, C& l, C* o, int64_t ldo) {
  using V = vec_of<T>;
  constexpr int W = V::width;
  V top = V::set1(m);
  for (int64_t j = 0; j < kTileKeys; j += W) top = max(top, V::load(scores + j));
  C lanes[W];
  V::template fold_max<1>(top).store(lanes);
  const C base = lanes[0] == kNegInf<C> ? C(0) : lanes[0];
  V sum = V::zero();
  for (int64_t j = 0; j < kTileKeys; j += W) {
    const V x = exp_of_negative(V::load(scores + j) - V::set1(base));
    sum = sum + x;
    P::store_elements(x, p + j);
  }
  const C shrink = m == kNegInf<C> ? C(0) : std::exp(m - base);
  l = l * shrink + reduce_add(sum);
  m = lanes[0];
  if (shrink != 1)
    for (int64_t d = 0; d < ldo; d += W) (V::load(o + d) * V::set1(shrink)).store(o + d);
}

template <class T>
void block_task(const AttentionProblem& p, const AttentionTask& task, typename vec_of<T>::scalar* partials) {
  using P = product_of<T>;
  using V = vec_of<T>;
  using C = typename P::C;
  using Unit = typename P::Unit;
  using Element = typename P::Element;
  using G = GemmTile<P>;
  constexpr int W = V::width;
  static_assert(kTileKeys % G::NR == 0);
  const Rows<T> rows(p, task);
  const int64_t count = task.row_end - task.row_begin;
  const int64_t k_units = G::units(p.head_dim), ldo = G::padded(p.v_dim);

  Element *q, *prob;
  Unit* kv;
  T *k_stage, *v_stage;
  C *s, *o, *m, *l;
  auto carve = [&](Carver c) {
    q = c.take<Element>(count * k_units * P::kPack);
    prob = c.take<Element>(count * kTileKeys);
    kv = c.take<Unit>(std::max(kTileKeys * k_units, ldo * G::units(kTileKeys)));
    k_stage = c.take<T>(p.k.dim == 1 ? 0 : kTileKeys * p.head_dim);
    v_stage = c.take<T>(p.v.dim == 1 ? 0 : kTileKeys * p.v_dim);
    s = c.take<C>(count * kTileKeys);
    o = c.take<C>(count * ldo);
    m = c.take<C>(count);
    l = c.take<C>(count);
    return c.used();
  };
  const size_t bytes = carve(Carver());
  carve(Carver(thread_scratch(Scratch::task, bytes)));

  for (int64_t r = 0; r < count; ++r) {
    Element* to = q + r * k_units * P::kPack;
    copy_row(rows.at(p.q, task.row_begin + r), p.q.dim, p.head_dim, to);
    if (p.head_dim % P::kPack != 0) to[p.head_dim] = P::element(T{});
    m[r] = kNegInf<C>;
    l[r] = 0;
  }
  std::fill(o, o + count * ldo, C(0));

  const Visibility see = visibility_of(p, rows.s, rows.kv_head);
  const TileList tiles = TileList::of(see, rows.positions(task.row_begin, task.row_end));
  TileSource<T> k(rows, p.k, p.head_dim, k_stage), v(rows, p.v, p.v_dim, v_stage);
  for (int64_t t = task.first_tile; t < std::min(tiles.count(), task.last_tile); ++t) {
    int64_t first, keys;
    tiles.tile(t, first, keys);
    const Tile<T> kt = k.load(first, keys);
    kt.visit([&](const auto& at) { pack_transposed<P>(at, keys, p.head_dim, kv); });
    gemm<P>(count, keys, k_units, reinterpret_cast<const Unit*>(q), k_units, kv, s, kTileKeys, false);
    const bool full = tile_is_full(rows, see, task.row_begin, task.row_end, first, keys);
    for (int64_t r = 0; r < count; ++r) {
      C* row = s + r * kTileKeys;
      scale_scores<V>(p, keys, row);
      if (!full) mask_row(rows, see, task.row_begin + r, first, keys, row, 1);
      for (int64_t j = keys; j < kTileKeys; ++j) row[j] = kNegInf<C>;
      block_softmax<T>(row, prob + r * kTileKeys, m[r], l[r], o + r * ldo, ldo);
    }
    const Tile<T> vt = v.load(first, keys);
    vt.visit([&](const auto& at) { pack_straight<P>(at, keys, p.v_dim, kv); });
    gemm<P>(count, p.v_dim, G::units(keys), reinterpret_cast<const Unit*>(prob), kTileKeys / P::kPack, kv, o, ldo,
            true);
  }
  for (int64_t r = 0; r < count; ++r) {
    C* row = o + r * ldo;
    for (int64_t d = 0; d < p.v_dim; d += 2 * W) {
      V low = V::load(row + d), high = V::load(row + d + W);
      P::restore(low, high);
      low.store(row + d);
      high.store(row + d + W);
    }
    finish_or_keep<T>(p, task, rows, partials, task.row_begin + r, row, m[r], l[r]);
  }
}

}  // namespace effops::cpu::EFFOPS_ISA
