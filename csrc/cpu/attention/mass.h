// Attention mass from a saved log-sum-exp: a task owns some tiles of keys of a (sequence, KV head), visits all rows
// that see them and writes each key's sum once, so that no sum depends on how tasks are cut or on who runs them. Few
// rows take the streaming score product, many a GEMM against the task's packed keys. Floor: the bytes of the keys,
// once, and half of attention's multiplications.
#pragma once

#include "common/mass_problem.h"
#include "common/parallel.h"
#include "common/scratch.h"
#include "cpu/attention/stream.h"
#include "cpu/gemm/gemm.h"

namespace effops::cpu::EFFOPS_ISA {

inline constexpr int64_t kMassTiles = 8;  // of a task with many rows: their packed keys stay in the second-level cache

template <class T>
class MassTask {
 protected:
  using P = product_of<T>;
  using V = vec_of<T>;
  using C = typename V::scalar;
  static constexpr int W = V::width;

 public:
  // The tiles [first_tile, last_tile) of all keys, and all rows.
  MassTask(const MassProblem& m, const AttentionTask& task)
      : p_(m.attention),
        mass_(m.mass),
        task_(task),
        rows_(p_, task),
        see_(visibility_of(p_, rows_.s, rows_.kv_head)),
        begin_(see_.start + task.first_tile * kTileKeys),
        end_(std::min(see_.len, see_.start + task.last_tile * kTileKeys)) {}

  bool empty() const { return begin_ >= end_ || !seen(task_.row_begin, task_.row_end, begin_, end_ - begin_); }

 protected:
  // May a row of [row_begin, row_end) see a key of [first, first + keys)?
  bool seen(int64_t row_begin, int64_t row_end, int64_t first, int64_t keys) const {
    const TileList t = TileList::of(see_, rows_.positions(row_begin, row_end));
    return (first < t.end[1] && first + keys > t.begin[1]) || (first < t.end[0] && first + keys > t.begin[0]);
  }
  // What is taken off a row's scores: infinite for a row without keys.
  C divisor(int64_t row) const {
    const C lse = *rows_.lse_at(p_.lse, row);
    return lse == kNegInf<C> ? -kNegInf<C> : lse;
  }
  void add(int64_t first, int64_t keys, const C* sums) const {
    C* to = reinterpret_cast<C*>(mass_.data) + rows_.sequence * mass_.batch + rows_.kv_head * mass_.head +
            first * mass_.token;
    for (int64_t j = 0; j < keys; ++j) to[j * mass_.token] += sums[j];
  }

  const AttentionProblem& p_;
  const RowView& mass_;
  const AttentionTask& task_;
  Rows<T> rows_;
  Visibility see_;
  int64_t begin_, end_;  // keys
};

template <class T>
class MassStream : MassTask<T> {
  using typename MassTask<T>::P, typename MassTask<T>::V, typename MassTask<T>::C;
  using MassTask<T>::W, MassTask<T>::p_, MassTask<T>::task_, MassTask<T>::rows_, MassTask<T>::see_;

 public:
  using MassTask<T>::MassTask, MassTask<T>::empty;

  void run() {
    Carver measure;
    carve(measure);
    Carver carver(thread_scratch(Scratch::task, measure.used()));
    carve(carver);
    TileSource<T> k(rows_, p_.k, p_.head_dim, stage_);
    for (int i = 0; i < groups_; ++i) by_mr(group_[i], [&](auto mr) { this->template begin<mr()>(group_[i]); });
    for (int64_t first = this->begin_; first < this->end_; first += kTileKeys) {
      const int64_t keys = std::min(kTileKeys, this->end_ - first);
      if (!this->seen(task_.row_begin, task_.row_end, first, keys)) continue;
      const Tile<T> tile = k.load(first, keys);
      std::fill(sums_, sums_ + kTileKeys, C(0));
      for (int i = 0; i < groups_; ++i)
        by_mr(group_[i], [&](auto mr) { this->template visit<mr()>(group_[i], tile, first); });
      this->add(first, keys, sums_);
    }
  }

 private:
  void carve(Carver& c) {
    stage_ = c.take<T>(p_.k.dim == 1 ? 0 : kTileKeys * p_.head_dim);
    sums_ = c.take<C>(kTileKeys);
    groups_ = 0;
    for (int64_t row = task_.row_begin; row < task_.row_end; row += group_[groups_++].rows) {
      StreamGroup<P>& g = group_[groups_];
      g.take(row, task_.row_end);
      g.q = c.take<typename P::Element>(padded<P>(p_.head_dim) * g.mr);
      g.scores = c.take<C>((kTileKeys + W) * g.mr);
      g.state = c.take<C>(W);  // the divisor of row i % mr
    }
  }

  template <int MR>
  void begin(StreamGroup<P>& g) {
    for (int m = 0; m < MR; ++m) {  // padding rows repeat the last one, with weights of 0
      const int64_t row = g.row + std::min<int64_t>(m, g.rows - 1);
      place_query<P, T, MR>(rows_.at(p_.q, row), p_.q.dim, p_.head_dim, m, g.q);
      for (int i = m; i < W; i += MR) g.state[i] = m < g.rows ? this->divisor(row) : -kNegInf<C>;
    }
  }

  template <int MR>
  void visit(StreamGroup<P>& g, const Tile<T>& tile, int64_t first) {
    const int64_t keys = tile.keys, whole = (keys + W - 1) / W * W;
    const Reader reader = groups_ == 1 ? Reader::only : g.row == task_.row_begin ? Reader::first : Reader::later;
    tile.visit([&](const auto& rows) {
      const V factor = V::set1(static_cast<C>(score_factor(p_)));
      stream_scores<T, MR>(rows, keys, p_.head_dim, g.q, factor, g.scores, reader);
    });
    std::fill(g.scores + keys * MR, g.scores + whole * MR, kNegInf<C>);
    cap_scores<V>(p_, keys * MR, g.scores);
    if (!tile_is_full(rows_, see_, g.row, g.row + g.rows, first, keys))
      for (int m = 0; m < g.rows; ++m) mask_row(rows_, see_, g.row + m, first, keys, g.scores + m, MR);
    const V divisor = V::load(g.state);
    for (int64_t j = 0; j < keys; j += W) {
      V x[MR];
#pragma GCC unroll 8
      for (int i = 0; i < MR; ++i) x[i] = exp(V::load(g.scores + j * MR + i * W) - divisor);
      rows_apart<MR>(x);
      V sum = V::load(sums_ + j);
#pragma GCC unroll 8
      for (int m = 0; m < MR; ++m) sum = sum + x[m];
      sum.store(sums_ + j);
    }
  }

  T* stage_;
  C* sums_;
  int groups_ = 0;
  StreamGroup<P> group_[kStreamRows];
};

template <class T>
class MassBlock : MassTask<T> {
  using typename MassTask<T>::P, typename MassTask<T>::V, typename MassTask<T>::C;
  using MassTask<T>::W, MassTask<T>::p_, MassTask<T>::task_, MassTask<T>::rows_, MassTask<T>::see_;
  using Unit = typename P::Unit;
  using Element = typename P::Element;
  using G = GemmTile<P>;

 public:
  using MassTask<T>::MassTask, MassTask<T>::empty;

  void run() {
    const size_t bytes = carve(Carver());
    carve(Carver(thread_scratch(Scratch::task, bytes)));
    TileSource<T> k(rows_, p_.k, p_.head_dim, stage_);
    for (int64_t i = 0; i < tiles(); ++i)
      k.load(first_of(i), keys_of(i)).visit([&](const auto& rows) {
        pack_transposed<P>(rows, keys_of(i), p_.head_dim, panel(i));
      });
    std::fill(sums_, sums_ + tiles() * kTileKeys, C(0));
    for (int64_t row = task_.row_begin; row < task_.row_end; row += kBlockRows) {
      const int64_t end = std::min(row + kBlockRows, task_.row_end);
      if (!this->seen(row, end, this->begin_, this->end_ - this->begin_)) continue;
      load_rows(row, end);
      for (int64_t i = 0; i < tiles(); ++i)
        if (this->seen(row, end, first_of(i), keys_of(i))) visit(row, end, i);
    }
    for (int64_t i = 0; i < tiles(); ++i) this->add(first_of(i), keys_of(i), sums_ + i * kTileKeys);
  }

 private:
  int64_t tiles() const { return (this->end_ - this->begin_ + kTileKeys - 1) / kTileKeys; }
  int64_t first_of(int64_t i) const { return this->begin_ + i * kTileKeys; }
  int64_t keys_of(int64_t i) const { return std::min(kTileKeys, this->end_ - first_of(i)); }
  Unit* panel(int64_t i) const { return k_ + i * kTileKeys * G::units(p_.head_dim); }

  size_t carve(Carver c) {
    stage_ = c.take<T>(p_.k.dim == 1 ? 0 : kTileKeys * p_.head_dim);
    k_ = c.take<Unit>(tiles() * kTileKeys * G::units(p_.head_dim));
    q_ = c.take<Element>(kBlockRows * G::units(p_.head_dim) * P::kPack);
    s_ = c.take<C>(kBlockRows * kTileKeys);
    sums_ = c.take<C>(tiles() * kTileKeys);
    return c.used();
  }

  void load_rows(int64_t begin, int64_t end) {
    const int64_t stride = G::units(p_.head_dim) * P::kPack;
    for (int64_t row = begin; row < end; ++row) {
      Element* to = q_ + (row - begin) * stride;
      copy_row(rows_.at(p_.q, row), p_.q.dim, p_.head_dim, to);
      if (p_.head_dim % P::kPack != 0) to[p_.head_dim] = P::element(T{});
    }
  }

  void visit(int64_t begin, int64_t end, int64_t i) {
    const int64_t first = first_of(i), keys = keys_of(i), units = G::units(p_.head_dim);
    gemm<P>(end - begin, keys, units, reinterpret_cast<const Unit*>(q_), units, panel(i), s_, kTileKeys, false);
    const bool full = tile_is_full(rows_, see_, begin, end, first, keys);
    alignas(64) C block[kTileKeys] = {};
    for (int64_t row = begin; row < end; ++row) {
      C* s = s_ + (row - begin) * kTileKeys;
      scale_scores<V>(p_, keys, s);
      if (!full) mask_row(rows_, see_, row, first, keys, s, 1);
      std::fill(s + keys, s + kTileKeys, kNegInf<C>);
      const V divisor = V::set1(this->divisor(row));
      for (int64_t j = 0; j < kTileKeys; j += W) (V::load(block + j) + exp(V::load(s + j) - divisor)).store(block + j);
    }
    C* const to = sums_ + i * kTileKeys;
    for (int64_t j = 0; j < kTileKeys; j += W) (V::load(to + j) + V::load(block + j)).store(to + j);
  }

  T* stage_;
  Unit* k_;
  Element* q_;
  C *s_, *sums_;
};

template <class T>
void attention_mass_typed(const MassProblem& m, const Parallel& parallel) {
  const AttentionProblem& p = m.attention;
  const int64_t rows = p.q_len * p.group();
  if (rows == 0) return;
  const bool few = streams(rows, p.head_dim);
  const int64_t size = few ? kStreamSplit : kMassTiles;
  const int64_t parts = (TileList::tiles_in(0, p.kv_capacity) + size - 1) / size;
  const int64_t work = p.batch * p.kv_heads * p.kv_capacity * rows * p.head_dim;
  parallel.for_each(p.batch * p.kv_heads * parts, work > kSerialWork, [&](int64_t i) {
    const int64_t part = i % parts, head = i / parts;
    const AttentionTask task{head / p.kv_heads, head % p.kv_heads, 0, rows, part * size, (part + 1) * size, 1, -1};
    const auto run = [](auto own) {
      if (!own.empty()) own.run();
    };
    few ? run(MassStream<T>(m, task)) : run(MassBlock<T>(m, task));
  });
}

}  // namespace effops::cpu::EFFOPS_ISA
