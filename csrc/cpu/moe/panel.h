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
  static constexpr bool kWide = sizeof(typename P::C) == 8;
#if defined(EFFOPS_ISA_AVX512)
  static constexpr int kRows = kWide ? 2 : 12, kRegisters = 32, kBurst = 1, kStreams = 1;
#elif defined(EFFOPS_ISA_AVX2)
  static constexpr int kRows = kWide ? 2 : 6, kRegisters = 16, kBurst = 4, kStreams = 4;
#else
  static constexpr int kRows = 2, kRegisters = 16, kBurst = 1, kStreams = 1;
#endif
  // Vectors of the panel's width, and those that `rows` rows are multiplied with at a time: all, if registers hold the
  // sums, a step's rows and a vector of the panel.
  static constexpr int kAll = kPanel / vec_of<typename P::C>::width;
  static constexpr int vectors(int64_t rows, int units) {
    return rows * kAll + (rows + 1) * units <= kRegisters ? kAll : 2;
  }
};

// Steps of the inner dimension that are taken together: `count` of each of `parts` parts that lie `apart` steps from
// each other, a burst of each part by turns. Few parts far apart: memory is read as that many streams. Many that lie
// side by side: one stream, in a loop that is long.
struct Steps {
  int64_t count, parts, apart;
};

// Bytes of memory to ask for: `ahead` of the first step, and so many on at each step, at each part, and at each pass
// over these steps.
struct Ask {
  int64_t ahead, step, part, pass;
};

// c [MR][32] at columns of NV vectors = rows of `a` times the panel, plus what is there if `more`.
template <class P, class B, int MR, int NV>
void panel_tile(const Steps& steps, const typename P::Unit* a, int64_t lda, const char* b, const Ask& ask, bool more,
                typename P::C* c) {
  using V = vec_of<typename P::C>;
  using Tile = PanelTile<P>;
  constexpr int kUnits = B::kUnits, kLine = 64, kStep = kPanel * B::kColumnBytes;
  constexpr bool kWhole = NV == Tile::kAll, kAsks = !kWhole || Tile::kStreams == 1;
  V acc[MR][NV];
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) acc[i][j] = more ? V::load(c + i * kPanel + j * V::width) : V::zero();
  const typename P::Unit* row[MR];
  for (int i = 0; i < MR; ++i) row[i] = a + i * lda;
  const auto step = [&](int64_t at, const char* y_at) __attribute__((always_inline)) {
    if constexpr (MR <= NV) {
      V x[MR][kUnits];
#pragma GCC unroll 16
      for (int i = 0; i < MR; ++i)
#pragma GCC unroll 2
        for (int u = 0; u < kUnits; ++u) x[i][u] = P::broadcast(row[i] + at + u);
#pragma GCC unroll 8
      for (int j = 0; j < NV; ++j) {
        V y[kUnits];
        B::load(y_at + j * V::width * B::kColumnBytes, y);
#pragma GCC unroll 2
        for (int u = 0; u < kUnits; ++u)
#pragma GCC unroll 16
          for (int i = 0; i < MR; ++i) acc[i][j] = P::multiply_add(y[u], x[i][u], acc[i][j]);
      }
    } else {
      V y[NV][kUnits];
#pragma GCC unroll 8
      for (int j = 0; j < NV; ++j) B::load(y_at + j * V::width * B::kColumnBytes, y[j]);
#pragma GCC unroll 16
      for (int i = 0; i < MR; ++i)
#pragma GCC unroll 2
        for (int u = 0; u < kUnits; ++u) {
          const V x = P::broadcast(row[i] + at + u);
#pragma GCC unroll 4
          for (int j = 0; j < NV; ++j) acc[i][j] = P::multiply_add(y[j][u], x, acc[i][j]);
        }
    }
  };
  int64_t k = 0;
  for (; k + Tile::kBurst <= steps.count; k += Tile::kBurst) {
    int64_t at = k * kUnits;
    const char* y_at = b + k * kStep;
    const char* ask_at = b + ask.ahead + k * ask.step;
    for (int64_t part = steps.parts; part > 0; --part) {
#pragma GCC unroll 4
      for (int i = 0; i < Tile::kBurst; ++i) {
        if constexpr (kAsks) {
#pragma GCC unroll 4
          for (int line = 0; line < (kWhole ? kStep : kLine); line += kLine)
            __builtin_prefetch(ask_at + i * ask.step + line, 0, 2);
        }
        step(at + i * kUnits, y_at + i * kStep);
      }
      at += steps.apart * kUnits;
      y_at += steps.apart * kStep;
      ask_at += ask.part;
    }
  }
  for (; k < steps.count; ++k) step(k * kUnits, b + k * kStep);  // the last of a single part
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) acc[i][j].store(c + i * kPanel + j * V::width);
}

// A block of `rows` rows, 1 to MR, times all of the panel's width.
template <class P, class B, int MR>
void panel_block(int64_t rows, const Steps& steps, const typename P::Unit* a, int64_t lda, const char* b, Ask ask,
                 bool more, typename P::C* c) {
  if constexpr (MR > 1)
    if (rows < MR) return panel_block<P, B, MR - 1>(rows, steps, a, lda, b, ask, more, c);
  constexpr int NV = PanelTile<P>::vectors(MR, B::kUnits), kColumns = NV * vec_of<typename P::C>::width;
  for (int at = 0; at < kPanel; at += kColumns, ask.ahead += ask.pass)
    panel_tile<P, B, MR, NV>(steps, a, lda, b + at * B::kColumnBytes, ask, more, c + at);
}

// How panels come: from a cache, from memory as one stream, or as several.
enum class PanelSource : int8_t { cache, stream, streams };

// All rows of a group, in chunks of nearly one size: f(first row, rows, products [rows][32]) after each. What does not
// multiply a panel's width at once goes through it in stretches that stay in the first-level cache until a chunk's rows
// have been served. The first chunk asks for memory: each pass over a stretch for its share of the next one, so that
// memory does not wait for arithmetic.
template <class P, class B, class F>
void panel_rows(int64_t rows, int64_t steps, const typename P::Unit* a, int64_t lda, const char* b, PanelSource source,
                F&& f) {
  using Tile = PanelTile<P>;
  constexpr int kRows = Tile::kRows, kChunk = 4 * kRows;
  constexpr int64_t kBurst = Tile::kBurst, kStep = kPanel * B::kColumnBytes, kAhead = 4096, kStretch = 16384 / kStep;
  const bool streams = source == PanelSource::streams && Tile::kStreams > 1;
  const int64_t apart = streams ? steps / (Tile::kStreams * kBurst) * kBurst : kBurst;
  const int64_t bursts = streams ? Tile::kStreams * apart : steps / kBurst * kBurst;  // steps before the last few
  const int64_t end = streams ? apart : bursts;
  alignas(64) typename P::C c[kChunk * kPanel];
  const int64_t chunks = (rows + kChunk - 1) / kChunk;
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    const int64_t first = rows * chunk / chunks, count = rows * (chunk + 1) / chunks - first;
    const int64_t blocks = (count + kRows - 1) / kRows, passes = blocks * (Tile::kAll / 2);
    const bool whole = Tile::vectors((count + blocks - 1) / blocks, B::kUnits) == Tile::kAll;
    const bool asks = chunk == 0 && source != PanelSource::cache;
    const auto multiply = [&](int64_t k, const Steps& taken) {
      Ask ask{asks ? kAhead : 0, kStep, taken.apart * kStep, 0};
      if (!whole) {
        const int64_t stretch = streams ? taken.count : taken.count * taken.parts;
        const int64_t step = asks ? kStep / passes : 0;
        const int64_t next = k + stretch < end ? stretch : steps - k;  // that of the panel behind this one, at the end
        ask = {next * kStep, step, streams ? taken.apart * kStep : kBurst * step, stretch * step};
      }
      for (int64_t block = 0; block < blocks; ++block) {
        const int64_t row = count * block / blocks, some = count * (block + 1) / blocks - row;
        panel_block<P, B, kRows>(some, taken, a + (first + row) * lda + k * B::kUnits, lda, b + k * kStep, ask, k > 0,
                                 c + row * kPanel);
        ask.ahead = whole ? 0 : ask.ahead + Tile::kAll / 2 * ask.pass;
      }
    };
    const int64_t most = whole ? end : kStretch / (streams ? Tile::kStreams : 1);
    for (int64_t k = 0; k < end; k += most) {
      const int64_t n = std::min(most, end - k);
      multiply(k, streams ? Steps{n, Tile::kStreams, apart} : Steps{kBurst, n / kBurst, kBurst});
    }
    if (bursts < steps || steps == 0) multiply(bursts, {steps - bursts, 1, 0});
    f(first, count, c);
  }
}

}  // namespace effops::cpu::EFFOPS_ISA
