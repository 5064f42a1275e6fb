// Prefetch for rows that stream from memory once. A processor may drop a prefetch while its miss
// buffers are full, and at full bandwidth they mostly are: so every line is asked for twice, far
// ahead and again nearer. The second request costs nothing where the first was granted.
#pragma once

#include <algorithm>

#include "cpu/simd/row_access.h"

namespace effops::cpu::EFFOPS_ISA {

// When element `at` of row i of a group is loaded, the lines around
// group + i * row + at * step + far (and + near) are asked for. Distances in elements.
struct Ahead {
  int64_t far = 0, near = 0, row = 0, step = 1;

  template <class T>
  void operator()(const T* group, int64_t i, int64_t at, int64_t count) const {
    const char* p = reinterpret_cast<const char*>(group + i * row + at * step);
    for (int64_t line = 0; line < count * int64_t(sizeof(T)); line += 64) {
      prefetch(p + far * int64_t(sizeof(T)) + line);
      prefetch(p + near * int64_t(sizeof(T)) + line);
    }
  }
};

struct NoAhead {
  template <class T>
  void operator()(const T*, int64_t, int64_t, int64_t) const {}
};

// The same for rows of a list, `far` and `near` counted in its entries: the list must go on so far.
template <class T>
struct ListedAhead {
  const T* const* list;
  int64_t far = 0, near = 0, column = 0;

  void operator()(const T*, int64_t i, int64_t at, int64_t count) const {
    const char* p = reinterpret_cast<const char*>(list[i + far] + column + at);
    const char* q = reinterpret_cast<const char*>(list[i + near] + column + at);
    for (int64_t line = 0; line < count * int64_t(sizeof(T)); line += 64) {
      prefetch(p + line);
      prefetch(q + line);
    }
  }
};

inline constexpr int64_t kFarBytes = 16384, kNearBytes = 8192;

// Who reads a tile: the only reader asks for the next lines far ahead and nearer; of several, the
// first asks far ahead and the others nearer.
enum class Reader { only, first, later };

// For groups of `rows` rows that all of `dim` is read of before the next group comes: rows that lie
// in line are asked for line after line, others row by row.
template <class T>
Ahead ahead_of_rows(const StridedRows<T>& at, int64_t rows, int64_t dim, int64_t chunk, Reader reader) {
  const int64_t stride = at.stride;
  const int64_t bytes = dim * int64_t(sizeof(T));
  int64_t far = std::max(rows * 2, kFarBytes / bytes) * stride;
  int64_t near = std::max(rows, kNearBytes / bytes) * stride;
  if (reader == Reader::first) near = far;
  if (reader == Reader::later) far = near;
  if (stride == dim && dim % chunk == 0) return {far, near, chunk, rows};
  return {far, near, stride, 1};
}

inline constexpr int64_t kListAhead = 64;  // entries that a list goes on beyond the rows in use

template <class T>
ListedAhead<T> ahead_of_rows(const ListedRows<T>& at, int64_t rows, int64_t dim, int64_t, Reader reader) {
  const int64_t bytes = dim * int64_t(sizeof(T));
  int64_t far = std::min(std::max(rows * 2, kFarBytes / bytes), kListAhead);
  int64_t near = std::min(std::max(rows, kNearBytes / bytes), kListAhead);
  if (reader == Reader::first) near = far;
  if (reader == Reader::later) far = near;
  return {at.list, far, near};
}

// The same for values, read in passes of `columns` columns from column `from`: pass `from` asks for
// the share of the lines that it is of the columns.
template <class T>
Ahead ahead_of_values(const StridedRows<T>& at, int64_t rows, int64_t dim, int64_t columns, int64_t from,
                      Reader reader) {
  const Ahead a = ahead_of_rows(at, rows, dim, columns, reader);
  const int64_t begin = a.row == columns ? from * rows : from;
  return {a.far + begin, a.near + begin, a.row, 1};
}

template <class T>
ListedAhead<T> ahead_of_values(const ListedRows<T>& at, int64_t rows, int64_t dim, int64_t columns, int64_t from,
                               Reader reader) {
  ListedAhead<T> a = ahead_of_rows(at, rows, dim, columns, reader);
  a.column = from;
  return a;
}

// Rows a stretch of values that is read in several passes.
template <class T>
int64_t values_stretch(int64_t dim) {
  return std::max<int64_t>(8, kNearBytes / (dim * int64_t(sizeof(T))) & ~int64_t(1));
}

}  // namespace effops::cpu::EFFOPS_ISA
