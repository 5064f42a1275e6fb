// The streaming loop: few query rows against many keys, at memory speed. Rows go in groups of
// MR = 8 (with vectors of 16), 4, 2 or 1; scores lie key-major with the group's rows side by side
// ([key][MR]), so that one vector holds width / MR keys and every lane's row is lane % MR.
#pragma once

#include "common/scratch.h"
#include "cpu/attention/rows.h"
#include "cpu/attention/tile.h"
#include "cpu/gemv/dot_rows.h"

namespace effops::cpu::EFFOPS_ISA {

// scores[j][m] = factor * <k_j, q_m>. The last vector repeats the last key.
template <class T, int MR, class R, class P = product_of<T>, class V = vec_of<T>>
void stream_scores(const R& k, int64_t keys, int64_t dim, const typename P::Element* q, V factor, typename P::C* scores,
                   Reader reader) {
  constexpr int NK = kDotRows<V, MR>;
  auto ahead = ahead_of_rows(k, NK, dim, P::kChunk, reader);
  for (int64_t j = 0; j < keys; j += NK) {
    const T* row[NK];
    for (int i = 0; i < NK; ++i) row[i] = k[std::min(j + i, keys - 1)];
    (dot_rows<P, T, MR>(row, dim, ahead, InterleavedQuery<P, MR>{q}) * factor).store(scores + j * MR);
    if constexpr (std::is_same_v<R, ListedRows<T>>) ahead.list += NK;
  }
}

// o[chunk][m] = o * alpha[m] + sum_j p[j][m] v_j over rows [first, last) for the ND chunks from
// column `at`. load(j, column) gives a chunk of row j.
template <class T, int MR, int ND, class P, class Load>
inline void stream_values_by(int64_t first, int64_t last, int64_t at, const typename P::Unit* p,
                             const typename P::C* alpha, typename P::C* o, Load load) {
  using V = vec_of<T>;
  constexpr int W = P::W, kChunk = P::kChunk;
  V acc[ND][MR][2];
  typename P::C* const oc = o + at * MR;
#pragma GCC unroll 8
  for (int d = 0; d < ND; ++d)
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m)
      for (int h = 0; h < 2; ++h) acc[d][m][h] = V::load(oc + ((d * MR + m) * 2 + h) * W) * V::set1(alpha[m]);
  int64_t j = first;
  auto step = [&](bool pair_of_rows) {
#pragma GCC unroll 8
    for (int d = 0; d < ND; ++d) {
      const auto x = load(j, at + d * kChunk);
      typename P::Chunk y{};
      if constexpr (P::kPack == 2) {
        if (pair_of_rows) y = load(j + 1, at + d * kChunk);
      }
      const auto pair = P::pack_rows(x, y);
      const V low = P::load_units(reinterpret_cast<const typename P::Unit*>(&pair.a));
      const V high = P::load_units(reinterpret_cast<const typename P::Unit*>(&pair.b));
#pragma GCC unroll 8
      for (int m = 0; m < MR; ++m) {
        const V w = P::broadcast(p + j / P::kPack * MR + m);
        acc[d][m][0] = P::multiply_add(low, w, acc[d][m][0]);
        acc[d][m][1] = P::multiply_add(high, w, acc[d][m][1]);
      }
    }
  };
  for (; j + P::kPack <= last; j += P::kPack) step(true);
  if (j < last) step(false);
#pragma GCC unroll 8
  for (int d = 0; d < ND; ++d)
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m)
      for (int h = 0; h < 2; ++h) acc[d][m][h].store(oc + ((d * MR + m) * 2 + h) * W);
}

// The value product of a tile, ND chunks of columns at a time. Where that takes several passes, the
// tile is cut into stretches of rows short enough that memory is still read nearly in order.
template <class T, int MR, class R, class P = product_of<T>>
void stream_values(const R& v, int64_t keys, int64_t dim, const typename P::Unit* p, const typename P::C* alpha,
                   typename P::C* o, Reader reader) {
  constexpr int kChunk = P::kChunk, ND = P::W == 16 ? (MR == 8 ? 1 : MR == 4 ? 2 : 4) : 1;
  const typename P::C keep[8] = {1, 1, 1, 1, 1, 1, 1, 1};
  const int64_t rows = dim <= ND * kChunk || reader == Reader::later ? kTileKeys : values_stretch<T>(dim);
  for (int64_t first = 0; first < keys; first += rows) {
    const int64_t last = std::min(keys, first + rows);
    auto pass = [&](auto nd, int64_t at, auto load) {
      auto ahead = ahead_of_values(v, last - first, dim, nd() * kChunk, at, reader);
      if constexpr (std::is_same_v<R, ListedRows<T>>) ahead.list += first;
      const T* const from = v[first];
      stream_values_by<T, MR, nd(), P>(first, last, at, p, first == 0 ? alpha : keep, o,
                                       [&](int64_t j, int64_t column) {
                                         ahead(from, j - first, column - at, kChunk);
                                         return load(v[j] + column);
                                       });
    };
    auto whole = [](const T* row) { return P::load(row); };
    int64_t at = 0;
    for (; at + ND * kChunk <= dim; at += ND * kChunk) pass(std::integral_constant<int, ND>(), at, whole);
    if constexpr (ND > 1)
      for (; at + kChunk <= dim; at += kChunk) pass(std::integral_constant<int, 1>(), at, whole);
    if (at < dim)
      pass(std::integral_constant<int, 1>(), at,
           [&](const T* row) { return P::load_n(row, static_cast<int>(dim - at)); });
  }
}

// A group of up to MR rows: queries, running state, output, in the loop's layouts.
template <class P>
struct StreamGroup {
  using C = typename P::C;
  int64_t row = 0, rows = 0;  // rows <= mr; the rest is padding
  int mr = 1;
  typename P::Element* q = nullptr;
  C *o = nullptr, *scores = nullptr, *state = nullptr;  // state: m then l, one vector each
  typename P::Unit* p = nullptr;
  C alpha[8] = {};

  // As many of the rows [begin, end) as go together.
  void take(int64_t begin, int64_t end) {
    const int64_t left = end - begin;
    row = begin;
    mr = P::W == 16 && left >= 7 ? 8 : left >= 3 ? 4 : int(left);
    rows = std::min<int64_t>(left, mr);
  }
};

// f(the group's mr as a constant)
template <class P, class F>
void by_mr(const StreamGroup<P>& g, F&& f) {
  if constexpr (P::W == 16)
    if (g.mr == 8) return f(std::integral_constant<int, 8>());
  if (g.mr == 4) return f(std::integral_constant<int, 4>());
  if (g.mr == 2) return f(std::integral_constant<int, 2>());
  f(std::integral_constant<int, 1>());
}

// A row's elements up to a whole chunk.
template <class P>
int64_t padded(int64_t dim) {
  return (dim + P::kChunk - 1) / P::kChunk * P::kChunk;
}

// Online softmax of one tile: masked scores to units of probability relative to the running
// maximum. m and l are vectors whose lane i belongs to row i % MR; l is summed over lanes at the end.
template <class T, int MR, class P = product_of<T>>
void stream_softmax(StreamGroup<P>& g, int64_t keys) {
  using V = vec_of<T>;
  using C = typename P::C;
  constexpr int W = V::width;
  const int64_t lanes_used = (keys * MR + W - 1) / W * W;
  V m = V::load(g.state), l = V::load(g.state + W), top = m;
  for (int64_t i = 0; i < lanes_used; i += W) top = max(top, V::load(g.scores + i));
  top = V::template fold_max<MR>(top);
  const V base = where_less(V::set1(kNegInf<C>), top, top, V::zero());
  const V shrink = exp_of_negative(m - base);
  l = l * shrink;
  for (int64_t i = 0; i < lanes_used; i += W) {
    const V x = exp_of_negative(V::load(g.scores + i) - base);
    l = l + x;
    P::template store_units<MR>(x, g.p + i / P::kPack);
  }
  top.store(g.state);
  l.store(g.state + W);
  C lanes[W];
  shrink.store(lanes);
  for (int i = 0; i < MR; ++i) g.alpha[i] = lanes[i];
}

template <class T>
class StreamTask {
  using P = product_of<T>;
  using V = vec_of<T>;
  using C = typename P::C;
  static constexpr int W = V::width;

 public:
  StreamTask(const AttentionProblem& p, const AttentionTask& task, C* partials)
      : p_(p), task_(task), rows_(p, task), partials_(partials) {}

  void run() {
    T *k_stage, *v_stage;
    C* row_buffer;
    Carver measure;
    carve(measure, k_stage, v_stage, row_buffer);
    Carver carver(thread_scratch(Scratch::task, measure.used()));
    carve(carver, k_stage, v_stage, row_buffer);

    const Visibility see = visibility_of(p_, rows_.s, rows_.kv_head);
    const TileList tiles = TileList::of(see, rows_.positions(task_.row_begin, task_.row_end));
    TileSource<T> k(rows_, p_.k, p_.head_dim, k_stage), v(rows_, p_.v, p_.v_dim, v_stage);
    for (int i = 0; i < groups_; ++i) by_mr(group_[i], [&](auto mr) { this->template begin<mr()>(group_[i]); });
    for (int64_t t = task_.first_tile; t < std::min(tiles.count(), task_.last_tile); ++t) {
      int64_t first, keys;
      tiles.tile(t, first, keys);
      const Tile<T> kt = k.load(first, keys);
      for (int i = 0; i < groups_; ++i)
        by_mr(group_[i], [&](auto mr) { this->template score<mr()>(group_[i], see, kt, first); });
      const Tile<T> vt = v.load(first, keys);
      for (int i = 0; i < groups_; ++i)
        by_mr(group_[i], [&](auto mr) {
          vt.visit([&](const auto& rows) {
            stream_values<T, mr()>(rows, keys, p_.v_dim, group_[i].p, group_[i].alpha, group_[i].o, reader(group_[i]));
          });
        });
    }
    for (int i = 0; i < groups_; ++i)
      by_mr(group_[i], [&](auto mr) { this->template end<mr()>(group_[i], row_buffer); });
  }

 private:
  Reader reader(const StreamGroup<P>& g) const {
    return groups_ == 1 ? Reader::only : g.row == task_.row_begin ? Reader::first : Reader::later;
  }

  void carve(Carver& c, T*& k_stage, T*& v_stage, C*& row_buffer) {
    k_stage = c.take<T>(p_.k.dim == 1 ? 0 : kTileKeys * p_.head_dim);
    v_stage = c.take<T>(p_.v.dim == 1 ? 0 : kTileKeys * p_.v_dim);
    row_buffer = c.take<C>(padded<P>(p_.v_dim));
    groups_ = 0;
    for (int64_t row = task_.row_begin; row < task_.row_end;) {
      StreamGroup<P>& g = group_[groups_++];
      g.take(row, task_.row_end);
      g.q = c.take<typename P::Element>(padded<P>(p_.head_dim) * g.mr);
      g.o = c.take<C>(padded<P>(p_.v_dim) * g.mr);
      g.scores = c.take<C>((kTileKeys + W) * g.mr);
      g.p = c.take<typename P::Unit>((kTileKeys + W) * g.mr);
      g.state = c.take<C>(2 * W);
      row += g.rows;
    }
  }

  template <int MR>
  void begin(StreamGroup<P>& g) {
    for (int m = 0; m < MR; ++m) {  // padding rows repeat the last one
      const int64_t row = g.row + std::min<int64_t>(m, g.rows - 1);
      place_query<P, T, MR>(rows_.at(p_.q, row), p_.q.dim, p_.head_dim, m, g.q);
    }
    std::fill(g.o, g.o + padded<P>(p_.v_dim) * MR, C(0));
    V::set1(kNegInf<C>).store(g.state);
    V::zero().store(g.state + W);
  }

  template <int MR>
  void score(StreamGroup<P>& g, const Visibility& see, const Tile<T>& kt, int64_t first) {
    const int64_t keys = kt.keys;
    kt.visit([&](const auto& rows) {
      const V factor = V::set1(static_cast<C>(score_factor(p_)));
      stream_scores<T, MR>(rows, keys, p_.head_dim, g.q, factor, g.scores, reader(g));
    });
    cap_scores<V>(p_, keys * MR, g.scores);
    for (int64_t i = keys * MR; i % W != 0; ++i) g.scores[i] = kNegInf<C>;
    if (!tile_is_full(rows_, see, g.row, g.row + g.rows, first, keys)) {
      for (int m = 0; m < MR; ++m) {
        const int64_t row = g.row + std::min<int64_t>(m, g.rows - 1);
        mask_row(rows_, see, row, first, keys, g.scores + m, MR);
      }
    }
    stream_softmax<T, MR>(g, keys);
  }

  template <int MR>
  void end(StreamGroup<P>& g, C* row_buffer) {
    C m[W], l[W];
    V::load(g.state).store(m);
    V::template fold_add<MR>(V::load(g.state + W)).store(l);
    for (int i = 0; i < g.rows; ++i) {
      for (int64_t at = 0; at < p_.v_dim; at += P::kChunk) {
        const C* from = g.o + at * MR + i * P::kChunk;
        V low = V::load(from), high = V::load(from + W);
        P::restore(low, high);
        low.store(row_buffer + at);
        high.store(row_buffer + at + W);
      }
      finish_or_keep<T>(p_, task_, rows_, partials_, g.row + i, row_buffer, m[i], l[i]);
    }
  }

  const AttentionProblem& p_;
  const AttentionTask& task_;
  Rows<T> rows_;
  C* partials_;
  int groups_ = 0;
  StreamGroup<P> group_[kStreamRows];
};

}  // namespace effops::cpu::EFFOPS_ISA
