// The products of one group's rows with 32 columns of its matrix, by the loop that suits them.
#pragma once

#include "common/grouped_plan.h"
#include "common/scratch.h"
#include "cpu/gemv/dot_rows.h"
#include "cpu/moe/pack.h"

namespace effops::cpu::EFFOPS_ISA {

// Rows as P sees them, zero beyond their elements up to a whole chunk. Four rows may be read past the last one.
template <class P>
struct PlacedRows {
  const typename P::Element* data;
  int64_t row;

  static constexpr int kBeyond = 4;
  static int64_t padded(int64_t in) { return (in + P::kChunk - 1) / P::kChunk * P::kChunk; }
  // One line more than needed where rows would fall on the same lines of a cache.
  static int64_t distance(int64_t in) {
    const int64_t n = padded(in), line = 64 / sizeof(typename P::Element);
    return n % (16 * line) == 0 ? n + std::max<int64_t>(line, P::kChunk) : n;
  }

  PlacedRows from(int64_t first) const { return {data + first * row, row}; }
  const typename P::Unit* units() const { return reinterpret_cast<const typename P::Unit*>(data); }
  int64_t unit_row() const { return row / P::kPack; }
};

// Of a matrix [in, out] of elements W in one of the layouts.
template <class T, class W>
class GroupProduct {
  using P = product_of<T>;
  using V = vec_of<T>;
  using C = typename P::C;
  using Unit = typename P::Unit;

 public:
  // `rows` says which loop is right, whatever the rows are in the end.
  GroupProduct(WeightLayout layout, const W* w, int64_t stride, int64_t in, int64_t rows)
      : layout_(layout),
        w_(w),
        stride_(stride),
        in_(in),
        loop_(grouped_loop(layout, rows)),
        few_(rows <= PanelTile<P>::kRows) {}

  // f(first row, rows, products [rows][32]) until all rows have been served. `tile` is the number of a stored panel.
  template <class F>
  void tile(int64_t tile, const TileColumns& columns, const PlacedRows<P>& x, int64_t rows, F&& f) const {
    switch (loop_) {
      case GroupedLoop::stream:
        return stream(columns, x, rows, f);
      case GroupedLoop::pack: {
        const int64_t units = (in_ + P::kPack - 1) / P::kPack;
        Unit* panel = static_cast<Unit*>(thread_scratch(Scratch::task, units * kPanel * sizeof(Unit)));
        if (layout_ == WeightLayout::rows) {
          pack_rows_of_columns<P>(w_, stride_, columns, in_, panel);
        } else {
          pack_columns<P>(w_, stride_, columns, in_, panel);
        }
        return panel_rows<P, UnitPanel<P>>(rows, units, x.units(), x.unit_row(), reinterpret_cast<const char*>(panel),
                                           PanelSource::cache, f);
      }
      case GroupedLoop::panels: {
        using B = stored_panel<P, W>;
        constexpr int64_t kUnitsAPair = 2 / P::kPack;
        constexpr bool kPairs = std::is_same_v<W, bf16> || std::is_same_v<W, int8_t>;
        const int64_t stored = kPairs ? (in_ + 1) / 2 : in_;
        const int64_t steps = kPairs ? stored * kUnitsAPair / B::kUnits : stored;
        const int64_t bytes = steps * kPanel * B::kColumnBytes;
        const auto source = few_ ? PanelSource::streams : PanelSource::stream;
        return panel_rows<P, B>(rows, steps, x.units(), x.unit_row(), reinterpret_cast<const char*>(w_) + tile * bytes,
                                source, f);
      }
    }
  }

 private:
  static constexpr int kGroups = (kStreamGroupRows + 3) / 4;

  template <class F>
  void stream(const TileColumns& columns, const PlacedRows<P>& x, int64_t rows, F&& f) const {
    alignas(64) C c[(kStreamGroupRows + PlacedRows<P>::kBeyond) * kPanel];
    for (int run = 0; run < 2; ++run)
      for (int j = 0; j < columns.count[run]; j += V::width) {
        const W* column[V::width];
        for (int i = 0; i < V::width; ++i) column[i] = w_ + columns(run * TileColumns::kRun + j + i) * stride_;
        C* to = c + run * TileColumns::kRun + j;
        const int64_t fours = rows / 4, left = rows % 4;
        if (fours > 0 || left == 3) stretch<4>(column, x, fours + (left == 3), to);
        if (left == 1 || left == 2) few(column, x.from(fours * 4), left, to + fours * 4 * kPanel);
      }
    f(0, rows, c);
  }

  // One or two rows. With vectors of 16 a single row goes as two equal ones: that reads 8 weight rows side by side
  // instead of 16, which memory and caches serve up to 1.5 times as fast.
  void few(const W* const (&column)[V::width], PlacedRows<P> x, int64_t rows, C* to) const {
    if (rows == 1 && V::width != 16) return stretch<1>(column, x, 1, to);
    if (rows == 1) x.row = 0;
    stretch<2>(column, x, 1, to);
  }

  // `groups` times MR rows against V::width columns. The first group asks for the columns that come next.
  template <int MR>
  void stretch(const W* const (&column)[V::width], const PlacedRows<P>& x, int64_t groups, C* to) const {
    constexpr int NK = kDotRows<V, MR>;
    V y[MR == 4 ? kGroups : 1][MR];
    const int64_t near = MR == 1 ? kNearBytes / 4 / int64_t(sizeof(W)) : 2 * NK * stride_;
    const Ahead ahead{V::width * stride_, near, stride_, 1};
    for (int part = 0; part < MR; ++part) {
      const W* row[NK];
      for (int i = 0; i < NK; ++i) row[i] = column[part * NK + i];
      for (int64_t g = 0; g < groups; ++g) {
        const RowQuery<P> query{x.data + g * MR * x.row, x.row};
        y[g][part] =
            g == 0 ? dot_rows<P, W, MR>(row, in_, ahead, query) : dot_rows<P, W, MR>(row, in_, NoAhead(), query);
      }
    }
    for (int64_t g = 0; g < groups; ++g) {
      rows_apart<MR>(y[g]);
      for (int m = 0; m < MR; ++m) y[g][m].store(to + (g * MR + m) * kPanel);
    }
  }

  WeightLayout layout_;
  const W* w_;      // of the group
  int64_t stride_;  // from feature to feature of rows, from input to input of columns
  int64_t in_;
  GroupedLoop loop_;
  bool few_;  // rows, which memory serves faster from several places of a panel at a time
};

}  // namespace effops::cpu::EFFOPS_ISA
