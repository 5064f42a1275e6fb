// A layer of experts in two products. The first leaves each slot's activations as the second reads them; the second's
// tasks own columns of the result and add up what every expert has for them, so that no result is written twice.
#pragma once

#include "cpu/moe/expert_weights.h"

namespace effops::cpu::EFFOPS_ISA {

template <class T, class Weights>
class Experts {
  using P = product_of<T>;
  using V = vec_of<T>;
  using C = typename P::C;
  using E = typename P::Element;

 public:
  Experts(const ExpertsProblem& p, const Parallel& parallel)
      : p_(p),
        parallel_(parallel),
        groups_(groups_of(p.gate_up)),
        gate_up_(p.gate_up, p.packed_gate_up, groups_),
        down_(p.down, p.packed_down, groups_) {
    if (!groups_.empty()) slots_ = groups_.back().first + groups_.back().rows;
  }

  void run() {
    auto carve = [&](Carver& memory) {
      gate_up_.take_x(memory, slots_);
      down_.take_placed(memory, slots_);
      activations_ = memory.take<E>(placed_elements<T>(slots_, p_.down.in));
    };
    Carver measure;
    carve(measure);
    const Workspace space(measure.used());
    Carver memory(space.data());
    carve(memory);
    row_ = PlacedRows<P>::distance(p_.down.in);
    if (!groups_.empty()) {
      gate_up_.place_x(parallel_);
      activate();
      down_.place({activations_, row_}, parallel_);
    }
    add_up();
  }

 private:
  int64_t rows_a_group() const { return groups_.empty() ? 0 : slots_ / static_cast<int64_t>(groups_.size()); }
  bool worth_threads(const GroupedProblem& p) const {
    return grouped_worth_threads(groups_.size() * p.in * p.out, rows_a_group());
  }

  void activate() {
    const GroupedProblem& p = p_.gate_up;
    const int64_t tiles = tiles_of(p), each = features_a_tile(p), features = p.features();
    const int64_t padded = PlacedRows<P>::padded(features);
    const GroupedPlan plan = plan_grouped(slots_, tiles, static_cast<int64_t>(groups_.size()), parallel_.threads);
    const int64_t pieces = (tiles + plan.tiles_a_task - 1) / plan.tiles_a_task;
    parallel_.for_each(pieces * static_cast<int64_t>(groups_.size()), worth_threads(p), [&](int64_t i) {
      const Group& g = groups_[i / pieces];
      const auto product = gate_up_.product(g);
      const int64_t first_tile = i % pieces * plan.tiles_a_task;
      for (int64_t tile = first_tile; tile < std::min(tiles, first_tile + plan.tiles_a_task); ++tile) {
        const TileColumns columns = columns_of(p, tile, p.out);
        const TileEpilogue<T> epilogue(p, g.index, columns);
        const int64_t n = tile * each, count = std::min(each, features - n);
        const int64_t written = tile + 1 == tiles ? padded - n : each;  // zeros behind the last feature
        product(tile, columns, [&](int64_t first, int64_t rows, const C* c) {
          for (int64_t r = 0; r < rows; ++r) {
            alignas(64) C values[2 * kPanel];
            epilogue.row(c + r * kPanel, values);
            std::fill(values + count, values + std::max(count, written), C(0));
            E* const to = activations_ + (g.first + first + r) * row_ + n;
            for (int64_t j = 0; j < written; j += V::width) store_rounded<T>(V::load(values + j), to + j);
          }
        });
      }
    });
  }

  // Columns of a task: every expert's share, weighted, in float32.
  void add_up() {
    const GroupedProblem& p = p_.down;
    const int64_t tiles = tiles_of(p), tokens = p_.tokens;
    const GroupedPlan plan = plan_scatter(tokens, tiles, parallel_.threads);
    const int64_t pieces = (tiles + plan.tiles_a_task - 1) / plan.tiles_a_task;
    const C* const weights = reinterpret_cast<const C*>(p_.weights);
    parallel_.for_each(pieces, worth_threads(p), [&](int64_t i) {
      const int64_t first_tile = i * plan.tiles_a_task, last_tile = std::min(tiles, first_tile + plan.tiles_a_task);
      const int64_t width = (last_tile - first_tile) * kPanel;
      C* const sums = static_cast<C*>(thread_scratch(Scratch::sums, tokens * width * sizeof(C)));
      std::fill_n(sums, tokens * width, C(0));
      for (const Group& g : groups_) {
        const auto product = down_.product(g);
        for (int64_t tile = first_tile; tile < last_tile; ++tile) {
          const TileColumns columns = columns_of(p, tile, p.out);
          const TileEpilogue<T> epilogue(p, g.index, columns);
          C* const at = sums + (tile - first_tile) * kPanel;
          product(tile, columns, [&](int64_t first, int64_t rows, const C* c) {
            for (int64_t r = 0; r < rows; ++r) {
              const int64_t slot = p.order[g.first + first + r];
              C values[kPanel];
              epilogue.row(c + r * kPanel, values);
              add(V::set1(weights[slot]), values, at + slot / p.k * width);
            }
          });
        }
      }
      const int64_t n = first_tile * kPanel;
      for (int64_t t = 0; t < tokens; ++t) {
        T* const to = reinterpret_cast<T*>(p_.out) + t * p.out + n;
        for_vectors<V>(std::min(width, p.out - n),
                       [&](int64_t j, int some) { store_n(V::load(sums + t * width + j), to + j, some); });
      }
    });
  }

  static void add(V weight, const C* values, C* to) {
    for (int j = 0; j < kPanel; j += V::width) fmadd(weight, V::load(values + j), V::load(to + j)).store(to + j);
  }

  const ExpertsProblem& p_;
  const Parallel& parallel_;
  std::vector<Group> groups_;
  Weights gate_up_, down_;
  int64_t slots_ = 0;
  E* activations_ = nullptr;
  int64_t row_ = 0;
};

template <class T>
void experts_typed(const ExpertsProblem& p, const Parallel& parallel) {
  if constexpr (sizeof(typename product_of<T>::C) == 4)
    if (p.packed_gate_up.data != nullptr) {
      if constexpr (std::is_same_v<T, bf16> && Words::kPairs)
        if (p.packed_gate_up.format == PackedFormat::int4)
          return Experts<T, PackedWeights<T, PairRows<Int4PairDots<Words>>>>(p, parallel).run();
      return Experts<T, PackedWeights<T, PackedRows>>(p, parallel).run();
    }
  p.gate_up.scale != nullptr ? Experts<T, ElementWeights<T, int8_t>>(p, parallel).run()
                             : Experts<T, ElementWeights<T, T>>(p, parallel).run();
}

}  // namespace effops::cpu::EFFOPS_ISA
