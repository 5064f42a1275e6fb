// Products of rows with a panel: 32 columns of a matrix side by side, for one step of the inner dimension after the
// other. A panel streams through memory line by line, and no sum has to be reduced, so that one loop is at read
// bandwidth for few rows and at the multipliers' rate for many.
#pragma once

#include <algorithm>

#include "cpu/simd/product.h"

namespace effops::cpu::EFFOPS_ISA {

inline constexpr int kPanel = 32;

// How stored elements become what P multiplies. A step is what one load serves: one unit, or two where an instruction
// set that multiplies single elements reads pairs.

// Units as they are: scratch panels, and stored ones of the compute type or of pairs for the dot instruction.
template <class P>
struct UnitPanel {
  static constexpr int kUnits = 1;
  static constexpr int64_t kColumnBytes = sizeof(typename P::Unit);
  template <class V>
  static void load(const char* at, V (&y)[kUnits]) {
    y[0] = P::load_units(reinterpret_cast<const typename P::Unit*>(at));
  }
};

// Elements that are widened.
template <class P, class T>
struct WidenedPanel {
  static constexpr int kUnits = 1;
  static constexpr int64_t kColumnBytes = sizeof(T);
  template <class V>
  static void load(const char* at, V (&y)[kUnits]) {
    y[0] = V::load(reinterpret_cast<const T*>(at));
  }
};

// Pairs of bfloat16 that are widened.
template <class P>
struct WidenedPairs {
  static constexpr int kUnits = 2;
  static constexpr int64_t kColumnBytes = 2 * sizeof(bf16);
  template <class V>
  static void load(const char* at, V (&y)[kUnits]) {
    V::split(reinterpret_cast<const bf16*>(at), y[0], y[1]);
  }
};

// Pairs of int8; the scales of columns are the caller's.
template <class P>
struct Int8Pairs {
  static constexpr int kUnits = 2 / P::kPack;
  static constexpr int64_t kColumnBytes = 2;
  template <class V>
  static void load(const char* at, V (&y)[kUnits]) {
    const int8_t* pairs = reinterpret_cast<const int8_t*>(at);
    if constexpr (P::kPack == 2) {
      y[0] = P::pairs_of(pairs);
    } else {
      V::split(pairs, y[0], y[1]);
    }
  }
};

template <class P, class T>
struct StoredPanelOf {
  using type = std::conditional_t<
      std::is_same_v<T, int8_t>, Int8Pairs<P>,
      std::conditional_t<std::is_same_v<T, bf16>, std::conditional_t<P::kPack == 2, UnitPanel<P>, WidenedPairs<P>>,
                         std::conditional_t<std::is_same_v<T, typename P::Unit>, UnitPanel<P>, WidenedPanel<P, T>>>>;
};
// Panels that lie in memory ready made: elements [k][32], bfloat16 and int8 as pairs [k / 2][32][2], on every
// instruction set.
template <class P, class T>
using stored_panel = typename StoredPanelOf<P, T>::type;

template <class P>
struct PanelTile {
#if defined(EFFOPS_ISA_AVX512)
  static constexpr int kRows = sizeof(typename P::C) == 8 ? 2 : 12;
#elif defined(EFFOPS_ISA_AVX2)
  static constexpr int kRows = sizeof(typename P::C) == 8 ? 2 : 6;
#else
  static constexpr int kRows = 2;
#endif
  // Vectors of the panel's width, and those that `rows` rows are multiplied with at a time.
  static constexpr int kAll = kPanel / vec_of<typename P::C>::width;
  static constexpr int vectors(int rows, int units) {
#if defined(EFFOPS_ISA_AVX512) || defined(EFFOPS_ISA_AVX2)
    return rows * kAll * units <= 8 ? kAll : 2;
#else
    return 2;
#endif
  }
};

// c [MR][32] at columns of NV vectors = rows of `a` times the panel, plus what is there if `more`. Lines `far` bytes on
// are asked for, all of the panel's width.
template <class P, class B, int MR, int NV>
inline void panel_tile(int64_t steps, const typename P::Unit* a, int64_t lda, const char* b, int64_t far, bool more,
                       typename P::C* c) {
  using V = vec_of<typename P::C>;
  constexpr int kUnits = B::kUnits, kLine = 64, kStep = kPanel * B::kColumnBytes;
  V acc[MR][NV];
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) acc[i][j] = more ? V::load(c + i * kPanel + j * V::width) : V::zero();
  for (int64_t k = 0; k < steps; ++k, b += kStep) {
    V y[NV][kUnits];
#pragma GCC unroll 8
    for (int j = 0; j < NV; ++j) B::load(b + j * V::width * B::kColumnBytes, y[j]);
#pragma GCC unroll 4
    for (int line = 0; line < kStep; line += kLine) __builtin_prefetch(b + line + far, 0, 2);
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i)
#pragma GCC unroll 2
      for (int u = 0; u < kUnits; ++u) {
        const V x = P::broadcast(a + i * lda + k * kUnits + u);
#pragma GCC unroll 4
        for (int j = 0; j < NV; ++j) acc[i][j] = P::multiply_add(y[j][u], x, acc[i][j]);
      }
  }
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) acc[i][j].store(c + i * kPanel + j * V::width);
}

// c [MR][32] = rows of `a` times the panel. Where its width is not multiplied at once and it comes from memory, it is
// gone through in stretches that stay in the first-level cache until all of the width has been multiplied.
template <class P, class B, int MR>
void panel_product(int64_t steps, const typename P::Unit* a, int64_t lda, const char* b, int64_t far,
                   typename P::C* c) {
  using V = vec_of<typename P::C>;
  constexpr int NV = PanelTile<P>::vectors(MR, B::kUnits), kColumns = NV * V::width;
  constexpr int64_t kStep = kPanel * B::kColumnBytes, kStretch = 16384 / kStep;
  const int64_t stretch = NV == PanelTile<P>::kAll || far == 0 ? steps : kStretch;
  int64_t k = 0;
  do {
    const int64_t count = std::min(stretch, steps - k);
    for (int at = 0; at < kPanel; at += kColumns)
      panel_tile<P, B, MR, NV>(count, a + k * B::kUnits, lda, b + k * kStep + at * B::kColumnBytes, at == 0 ? far : 0,
                               k > 0, c + at);
    k += count;
  } while (k < steps);
}

template <class P, class B, int MR>
void panel_product_of(int64_t rows, int64_t steps, const typename P::Unit* a, int64_t lda, const char* b, int64_t far,
                      typename P::C* c) {
  if constexpr (MR > 0) {
    if (rows == MR) return panel_product<P, B, MR>(steps, a, lda, b, far, c);
    panel_product_of<P, B, MR - 1>(rows, steps, a, lda, b, far, c);
  }
}

// All rows of a group, in blocks of nearly one size: f(first row, rows, products [rows][32]) after each. The first
// block asks for memory `far` bytes ahead, for the others the panel is near.
template <class P, class B, class F>
void panel_rows(int64_t rows, int64_t steps, const typename P::Unit* a, int64_t lda, const char* b, int64_t far,
                F&& f) {
  constexpr int kRows = PanelTile<P>::kRows;
  alignas(64) typename P::C c[kRows * kPanel];
  const int64_t blocks = (rows + kRows - 1) / kRows;
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t first = rows * block / blocks, count = rows * (block + 1) / blocks - first;
    panel_product_of<P, B, kRows>(count, steps, a + first * lda, lda, b, block == 0 ? far : 0, c);
    f(first, count, c);
  }
}

}  // namespace effops::cpu::EFFOPS_ISA
