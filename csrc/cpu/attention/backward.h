// Gradients of attention by tiled recompute from the log-sum-exp (FlashAttention-2, arXiv 2307.08691,
// algorithm 2). One task a (sequence, KV head): its rows span the group's query heads, so dK and dV
// need no reduction. Products are in the compute type whatever the storage.
#pragma once

#include "common/parallel.h"
#include "common/scratch.h"
#include "cpu/attention/rows.h"
#include "cpu/attention/tile.h"
#include "cpu/gemm/gemm.h"

namespace effops::cpu::EFFOPS_ISA {

template <class T>
class BackwardTask {
  using V = vec_of<T>;
  using C = typename V::scalar;
  using P = FmaProduct<V, C>;
  using G = GemmTile<P>;
  static constexpr int W = V::width;
  static constexpr int64_t kBlock = kTileKeys;  // rows a block

 public:
  BackwardTask(const AttentionProblem& p, const AttentionGradients& g, const AttentionTask& task)
      : p_(p), g_(g), rows_(p, task), sequence_(task.sequence), count_(task.row_end), dk_(p.head_dim), dv_(p.v_dim) {}

  void run() {
    const size_t bytes = carve(Carver());
    carve(Carver(thread_scratch(Scratch::task, bytes)));
    load_rows();
    const Visibility see = visibility_of(p_, rows_.s, rows_.kv_head);
    TileSource<T> k(rows_, p_.k, dk_, stage_), v(rows_, p_.v, dv_, stage_);
    for (int64_t first = see.start; first < see.len; first += kTileKeys) {
      const int64_t keys = std::min(kTileKeys, see.len - first);
      widen(k.load(first, keys), dk_, wide_);
      pack_transposed<P>(StridedRows<C>{wide_, dk_}, keys, dk_, k_t_);
      pack_straight<P>(StridedRows<C>{wide_, dk_}, keys, dk_, k_s_);
      widen(v.load(first, keys), dv_, wide_);
      pack_transposed<P>(StridedRows<C>{wide_, dv_}, keys, dv_, v_t_);
      std::fill(dk_tile_, dk_tile_ + kTileKeys * G::padded(dk_), C(0));
      std::fill(dv_tile_, dv_tile_ + kTileKeys * G::padded(dv_), C(0));
      for (int64_t row = 0; row < count_; row += kBlock) block(see, row, first, keys);
      store_tile(g_.dk, first, keys, dk_, dk_tile_);
      store_tile(g_.dv, first, keys, dv_, dv_tile_);
    }
    for (int64_t r = 0; r < count_; ++r) store_row(dq_ + r * G::padded(dk_), dk_, rows_.at(g_.dq, r), g_.dq.dim);
    if (g_.dsink) sink_gradient();
  }

 private:
  size_t carve(Carver c) {
    const int64_t blocks = (count_ + kBlock - 1) / kBlock;
    q_ = c.take<C>(count_ * dk_);
    d_out_ = c.take<C>(count_ * dv_);
    q_s_ = c.take<C>(blocks * kBlock * G::padded(dk_));
    d_out_s_ = c.take<C>(blocks * kBlock * G::padded(dv_));
    dq_ = c.take<C>(count_ * G::padded(dk_));
    delta_ = c.take<C>(count_);
    wide_ = c.take<C>(kTileKeys * std::max(dk_, dv_));
    stage_ = c.take<T>(kTileKeys * std::max(dk_, dv_));
    k_t_ = c.take<C>(kTileKeys * dk_);
    v_t_ = c.take<C>(kTileKeys * dv_);
    k_s_ = c.take<C>(kTileKeys * G::padded(dk_));
    dk_tile_ = c.take<C>(kTileKeys * G::padded(dk_));
    dv_tile_ = c.take<C>(kTileKeys * G::padded(dv_));
    for (C** s : {&s_, &ds_, &s_transposed_, &ds_transposed_}) *s = c.take<C>(kBlock * kTileKeys);
    return c.used();
  }

  static void widen(const Tile<T>& tile, int64_t dim, C* to) {
    for (int64_t j = 0; j < tile.keys; ++j) copy_row(tile.strided[j], 1, dim, to + j * dim);
  }

  void load_rows() {
    for (int64_t r = 0; r < count_; ++r) {
      copy_row(rows_.at(p_.q, r), p_.q.dim, dk_, q_ + r * dk_);
      copy_row(rows_.at(g_.d_out, r), g_.d_out.dim, dv_, d_out_ + r * dv_);
      const T* out = rows_.at(p_.out, r);
      C delta = g_.d_lse.data ? -*rows_.lse_at(g_.d_lse, r) : C(0);
      for (int64_t d = 0; d < dv_; ++d) delta += d_out_[r * dv_ + d] * C(to_float(out[d * p_.out.dim]));
      delta_[r] = delta;
    }
    for (int64_t row = 0; row < count_; row += kBlock) {
      const int64_t n = std::min(kBlock, count_ - row);
      pack_straight<P>(StridedRows<C>{q_ + row * dk_, dk_}, n, dk_, q_s_ + row * G::padded(dk_));
      pack_straight<P>(StridedRows<C>{d_out_ + row * dv_, dv_}, n, dv_, d_out_s_ + row * G::padded(dv_));
    }
    std::fill(dq_, dq_ + count_ * G::padded(dk_), C(0));
  }

  void block(const Visibility& see, int64_t row, int64_t first, int64_t keys) {
    const int64_t n = std::min(kBlock, count_ - row);
    const TileList seen = TileList::of(see, rows_.positions(row, row + n));
    const bool overlaps =
        (first < seen.end[1] && first + keys > seen.begin[1]) || (first < seen.end[0] && first + keys > seen.begin[0]);
    if (!overlaps) return;
    gemm<P>(n, keys, dk_, q_ + row * dk_, dk_, k_t_, s_, kTileKeys, false);
    gemm<P>(n, keys, dv_, d_out_ + row * dv_, dv_, v_t_, ds_, kTileKeys, false);
    for (int64_t r = 0; r < n; ++r) differentiate(see, row + r, first, keys, s_ + r * kTileKeys, ds_ + r * kTileKeys);
    for (int64_t r = 0; r < n; ++r)
      for (int64_t j = 0; j < keys; ++j) {
        s_transposed_[j * kBlock + r] = s_[r * kTileKeys + j];
        ds_transposed_[j * kBlock + r] = ds_[r * kTileKeys + j];
      }
    gemm<P>(n, dk_, keys, ds_, kTileKeys, k_s_, dq_ + row * G::padded(dk_), G::padded(dk_), true);
    gemm<P>(keys, dv_, n, s_transposed_, kBlock, d_out_s_ + row * G::padded(dv_), dv_tile_, G::padded(dv_), true);
    gemm<P>(keys, dk_, n, ds_transposed_, kBlock, q_s_ + row * G::padded(dk_), dk_tile_, G::padded(dk_), true);
  }

  // Scores to probabilities in s, gradients of the probabilities to those of <q, k> in ds.
  void differentiate(const Visibility& see, int64_t row, int64_t first, int64_t keys, C* s, C* ds) {
    const C lse = *rows_.lse_at(p_.lse, row), delta = delta_[row];
    if (lse == kNegInf<C>) {
      std::fill(s, s + kTileKeys, C(0));
      std::fill(ds, ds + kTileKeys, C(0));
      return;
    }
    scale_scores<V>(p_, keys, s);
    C slope[kTileKeys];  // d score / d <q, k>
    const C scale = static_cast<C>(p_.scale), cap = static_cast<C>(p_.softcap);
    for (int64_t j = 0; j < keys; ++j) slope[j] = cap == 0 ? scale : scale * (1 - (s[j] / cap) * (s[j] / cap));
    mask_row(rows_, see, row, first, keys, s, 1);
    for (int64_t j = keys; j < kTileKeys; ++j) s[j] = kNegInf<C>, ds[j] = 0, slope[j] = 0;
    for (int64_t j = 0; j < kTileKeys; j += W) {
      const V x = exp(V::load(s + j) - V::set1(lse));
      x.store(s + j);
      (x * (V::load(ds + j) - V::set1(delta)) * V::load(slope + j)).store(ds + j);
    }
  }

  void store_tile(const TensorView4& view, int64_t first, int64_t keys, int64_t dim, const C* tile) {
    T* to = reinterpret_cast<T*>(view.data) + rows_.sequence * view.batch + (rows_.s.k_begin + first) * view.token +
            rows_.kv_head * view.head;
    for (int64_t j = 0; j < keys; ++j) store_row(tile + j * G::padded(dim), dim, to + j * view.token, view.dim);
  }

  static void store_row(const C* from, int64_t dim, T* to, int64_t stride) {
    for (int64_t d = 0; d < dim; ++d) {
      if constexpr (sizeof(T) == 8) {
        to[d * stride] = from[d];
      } else {
        to[d * stride] = from_float<T>(from[d]);
      }
    }
  }

  void sink_gradient() {
    C* d_sink = reinterpret_cast<C*>(g_.dsink) + sequence_ * p_.heads;
    for (int64_t h = 0; h < rows_.group; ++h) d_sink[rows_.head(h)] = 0;
    for (int64_t r = 0; r < count_; ++r) {
      const C lse = *rows_.lse_at(p_.lse, r), sink = p_.sink_logits[rows_.head(r)];
      if (lse != kNegInf<C>) d_sink[rows_.head(r)] -= std::exp(sink - lse) * delta_[r];
    }
  }

  const AttentionProblem& p_;
  const AttentionGradients& g_;
  const Rows<T> rows_;
  const int64_t sequence_, count_, dk_, dv_;
  C *q_, *d_out_, *q_s_, *d_out_s_, *dq_, *delta_, *wide_, *k_t_, *v_t_, *k_s_, *dk_tile_, *dv_tile_;
  C *s_, *ds_, *s_transposed_, *ds_transposed_;
  T* stage_;
};

template <class T>
void attention_backward_typed(const AttentionProblem& p, const AttentionGradients& g, const Parallel& parallel) {
  parallel.for_each(p.batch * p.kv_heads, true, [&](int64_t i) {
    AttentionTask task{};
    task.sequence = i / p.kv_heads;
    task.kv_head = i % p.kv_heads;
    task.row_end = sequence_of(p, task.sequence).q_len * p.group();
    BackwardTask<T>(p, g, task).run();
  });
}

}  // namespace effops::cpu::EFFOPS_ISA
