// How a tile of keys or values is loaded: in place where its rows are contiguous, through a list of
// rows where they lie in pages or are selected, else through a copy. Never reads past a row's end or a sequence's.
#pragma once

#include "common/attention_plan.h"
#include "cpu/simd/prefetch.h"

namespace effops::cpu::EFFOPS_ISA {

template <class T>
struct Tile {
  StridedRows<T> strided;
  const T* const* list;  // null: strided
  int64_t keys;

  // Calls f with the rows of the tile, in either form.
  template <class F>
  void visit(F&& f) const {
    if (list) return f(ListedRows<T>{list});
    f(strided);
  }
};

template <class T>
class TileSource {
 public:
  // `stage` holds kTileKeys rows of `dim` elements; unused when rows are contiguous.
  template <class R>
  TileSource(const R& rows, const TensorView4& view, int64_t dim, T* stage)
      : view_(view),
        pages_(rows.p.pages),
        selected_(rows.p.selected),
        index_(rows.index),
        kv_head_(rows.kv_head),
        head_(rows.kv_head / rows.p.kv_share),
        end_(rows.s.kv_len),
        dim_(dim),
        stage_(stage) {
    base_ = reinterpret_cast<const T*>(view.data) + head_ * view.head;
    if (!pages_.given()) base_ += (rows.p.cu_k ? 0 : index_) * view.batch + rows.s.k_begin * view.token;
  }

  Tile<T> load(int64_t first, int64_t keys) {
    // The tile's rows and those that prefetches look ahead to; beyond the last key of a list it is repeated.
    const int64_t count = std::min<int64_t>(end_ - first, kTileKeys + kListAhead);
    if (!selected_.given() && in_line(first, count)) {
      const int64_t at = pages_.given() ? pages_.offset(view_, index_, head_, first) : first * view_.token;
      const StridedRows<T> rows{base_ + at, view_.token};
      return view_.dim == 1 ? Tile<T>{rows, nullptr, keys} : copied(rows, keys);
    }
    if (selected_.given()) {
      list_selected(first, count);
    } else {
      list_rows(first, count);
    }
    std::fill(list_ + count, list_ + kTileKeys + kListAhead, list_[count - 1]);
    if (view_.dim == 1) return {{}, list_, keys};
    return copied(ListedRows<T>{list_}, keys);
  }

 private:
  template <class R>
  Tile<T> copied(const R& rows, int64_t keys) {
    for (int64_t j = 0; j < keys; ++j) copy_row(rows[j], view_.dim, dim_, stage_ + j * dim_);
    return {{stage_, dim_}, nullptr, keys};
  }

  // Do these keys lie at one distance, as those of pages that follow each other in memory do?
  bool in_line(int64_t first, int64_t count) const {
    if (!pages_.given()) return true;
    const int64_t step = pages_.page * view_.token, begin = first / pages_.page;
    const int64_t page = pages_.entry_of(index_, head_, begin);
    for (int64_t i = begin + 1; i * pages_.page < first + count; ++i)
      if ((pages_.entry_of(index_, head_, i) - page) * view_.batch != (i - begin) * step) return false;
    return true;
  }

  void list_rows(int64_t first, int64_t count) {
    for (int64_t i = 0; i < count;) {
      const int64_t run = std::min(count - i, pages_.page - (first + i) % pages_.page);
      const T* row = base_ + pages_.offset(view_, index_, head_, first + i);
      for (int64_t j = 0; j < run; ++j, row += view_.token) list_[i + j] = row;
      i += run;
    }
  }

  void list_selected(int64_t first, int64_t count) {
    const int32_t* const list = selected_.list(index_, kv_head_);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t j = list[(first + i) * selected_.entry];
      list_[i] = base_ + (pages_.given() ? pages_.offset(view_, index_, head_, j) : j * view_.token);
    }
  }

  const TensorView4& view_;
  const PageTable& pages_;
  const Selection& selected_;
  const T* base_;
  int64_t index_, kv_head_, head_, end_, dim_;
  T* stage_;
  const T* list_[kTileKeys + kListAhead];
};

}  // namespace effops::cpu::EFFOPS_ISA
