// The two forms that the weights of experts have, each with the rows that its loop reads: row(i) of the slots, and the
// products of a group's rows with a tile, as f(tile, columns, f(first row, rows, products [rows][32])).
#pragma once

#include "cpu/gemv/packed_pairs.h"
#include "cpu/moe/grouped.h"

namespace effops::cpu::EFFOPS_ISA {

// Elements W, in any layout.
template <class T, class W>
class ElementWeights {
  using P = product_of<T>;

 public:
  ElementWeights(const GroupedProblem& p, const PackedMatrix&, const std::vector<Group>& groups)
      : p_(p), groups_(groups) {}

  // The rows of x that the groups name.
  void take_x(Carver& memory, int64_t slots) {
    placed_ = memory.take<typename P::Element>(placed_elements<T>(slots, p_.in));
  }
  void place_x(const Parallel& parallel) { rows_ = place_rows<T>(p_, groups_, placed_, parallel); }
  // Rows of slots that lie as P sees them.
  void take_placed(Carver&, int64_t) {}
  void place(const PlacedRows<P>& rows, const Parallel&) { rows_ = rows; }

  auto product(const Group& g) const {
    return [product = product_of_group<T, W>(p_, g, p_.invariant), x = rows_.from(g.first), count = g.rows](
               int64_t tile, const TileColumns& columns, auto&& f) { product.tile(tile, columns, x, count, f); };
  }

 private:
  const GroupedProblem& p_;
  const std::vector<Group>& groups_;
  typename P::Element* placed_ = nullptr;
  PlacedRows<P> rows_{};
};

// Numbers of few bits, Rows the form of x that their loop reads: panels are tiles.
template <class T, class Rows>
class PackedWeights {
  using P = product_of<T>;

 public:
  PackedWeights(const GroupedProblem& p, const PackedMatrix& first, const std::vector<Group>& groups)
      : p_(p), groups_(groups), matrices_(groups.size(), first) {
    for (size_t i = 0; i < groups.size(); ++i) matrices_[i].data += groups[i].index * first.bytes();
  }

  void take_x(Carver& memory, int64_t slots) { take_placed(memory, slots); }
  void place_x(const Parallel& parallel) {
    const T* const x = reinterpret_cast<const T*>(p_.x);
    place_all(parallel, [&](int64_t slot) { return x + p_.order[slot] / p_.k * p_.x_row; });
  }
  void take_placed(Carver& memory, int64_t) {
    if (groups_.empty()) return;
    int64_t room = 0;
    for (const Group& g : groups_) room += Rows::room(g.rows, p_.invariant);
    auto* x = memory.take<typename Rows::Input>(room * Rows::inputs(matrices_[0]));
    float* sums = memory.take<float>(room * matrices_[0].groups());
    rows_.clear();
    for (size_t i = 0; i < groups_.size(); ++i) {
      const int64_t own = Rows::room(groups_[i].rows, p_.invariant);
      rows_.emplace_back(matrices_[i], groups_[i].rows, p_.invariant, x, sums);
      if (x == nullptr) continue;  // measured
      x += own * Rows::inputs(matrices_[i]);
      sums += own * matrices_[i].groups();
    }
  }
  void place(const PlacedRows<P>& rows, const Parallel& parallel) {
    place_all(parallel, [&](int64_t slot) { return rows.data + slot * rows.row; });
  }

  auto product(const Group& g) const {
    return [&w = matrices_[&g - groups_.data()], &rows = rows_[&g - groups_.data()]](int64_t tile, const TileColumns&,
                                                                                     auto&& f) {
      if constexpr (std::is_same_v<Rows, PackedRows>) {
        with_steps(w.format, [&](auto steps) { packed_product<decltype(steps)>(w, rows, tile, f); });
      } else {
        packed_product<void>(w, rows, tile, f);
      }
    };
  }

 private:
  template <class F>
  void place_all(const Parallel& parallel, F&& row) {
    for (size_t i = 0; i < groups_.size(); ++i) {
      const Group& g = groups_[i];
      parallel.for_each(rows_[i].blocks(), g.rows * p_.in > kLayerSerial,
                        [&](int64_t block) { rows_[i].place(block, [&](int64_t r) { return row(g.first + r); }); });
    }
  }

  const GroupedProblem& p_;
  const std::vector<Group>& groups_;
  std::vector<PackedMatrix> matrices_;  // of each group
  std::vector<Rows> rows_;
};

}  // namespace effops::cpu::EFFOPS_ISA
