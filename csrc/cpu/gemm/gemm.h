// The one dense GEMM of the CPU kernels: C [m, n] (+)= A [m, k] B [k, n] in units (see product.h).
// A is row-major; B lies in zero-padded panels [k][NR], so that columns need no edge case.
#pragma once

#include <algorithm>

#include "cpu/simd/product.h"

namespace effops::cpu::EFFOPS_ISA {

template <class P>
struct GemmTile {
#if defined(EFFOPS_ISA_AVX512)
  static constexpr int MR = sizeof(typename P::C) == 8 ? 2 : 6, NV = sizeof(typename P::C) == 8 ? 2 : 4;
#elif defined(EFFOPS_ISA_AVX2)
  static constexpr int MR = sizeof(typename P::C) == 8 ? 2 : 6, NV = 2;
#else
  static constexpr int MR = 2, NV = 2;
#endif
  static constexpr int NR = NV * P::W;
  static int64_t padded(int64_t n) { return (n + NR - 1) / NR * NR; }
  static int64_t units(int64_t k) { return (k + P::kPack - 1) / P::kPack; }
};

template <class P, int MR>
inline void gemm_micro(int64_t units, const typename P::Unit* a, int64_t lda, const typename P::Unit* b,
                       typename P::C* c, int64_t ldc, bool accumulate) {
  using V = vec_of<typename P::C>;
  constexpr int W = P::W, NV = GemmTile<P>::NV;
  V acc[MR][NV];
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) acc[i][j] = accumulate ? V::load(c + i * ldc + j * W) : V::zero();
  for (int64_t k = 0; k < units; ++k, b += NV * W) {
    V y[NV];
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) y[j] = P::load_units(b + j * W);
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i) {
      const V x = P::broadcast(a + i * lda + k);
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) acc[i][j] = P::multiply_add(y[j], x, acc[i][j]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) acc[i][j].store(c + i * ldc + j * W);
}

template <class P, int MR>
void gemm_edge(int64_t rows, int64_t units, const typename P::Unit* a, int64_t lda, const typename P::Unit* b,
               typename P::C* c, int64_t ldc, bool accumulate) {
  if constexpr (MR > 0) {
    if (rows == MR) return gemm_micro<P, MR>(units, a, lda, b, c, ldc, accumulate);
    gemm_edge<P, MR - 1>(rows, units, a, lda, b, c, ldc, accumulate);
  }
}

// n is padded to whole panels: ldc >= GemmTile<P>::padded(n), and C's padding columns are written.
template <class P>
void gemm(int64_t m, int64_t n, int64_t units, const typename P::Unit* a, int64_t lda, const typename P::Unit* b,
          typename P::C* c, int64_t ldc, bool accumulate) {
  constexpr int MR = GemmTile<P>::MR, NR = GemmTile<P>::NR;
  for (int64_t j = 0; j < n; j += NR, b += NR * units)
    for (int64_t i = 0; i < m; i += MR)
      gemm_edge<P, MR>(std::min<int64_t>(MR, m - i), units, a + i * lda, lda, b, c + i * ldc + j, ldc, accumulate);
}

// B(k, n) = rows[n][k]: panels from n rows of k elements, by transposing blocks of units.
template <class P, class R>
void pack_transposed(const R& rows, int64_t n, int64_t k, typename P::Unit* to) {
  using V = vec_of<typename P::C>;
  constexpr int W = P::W, NR = GemmTile<P>::NR, kElements = W * P::kPack;
  const int64_t units = GemmTile<P>::units(k);
  for (int64_t j0 = 0; j0 < n; j0 += NR, to += NR * units) {
    for (int j = 0; j < NR; j += W) {
      for (int64_t u = 0; u < units; u += W) {
        const int left = static_cast<int>(std::min<int64_t>(kElements, k - u * P::kPack));
        V block[W];
        for (int i = 0; i < W; ++i) {
          const int64_t row = j0 + j + i;
          const auto* from = rows[std::min(row, n - 1)] + u * P::kPack;
          if (row >= n) {
            block[i] = V::zero();
          } else if constexpr (P::kPack == 2) {
            const auto chunk = left == kElements ? P::load(from) : P::load_n(from, left);
            block[i] = P::load_units(reinterpret_cast<const typename P::Unit*>(&chunk.a));
          } else {
            block[i] = left == kElements ? V::load(from) : V::load_n(from, left);
          }
        }
        V::transpose(block);
        const int64_t count = std::min<int64_t>(W, units - u);
        for (int64_t i = 0; i < count; ++i) block[i].store(reinterpret_cast<typename P::C*>(to + (u + i) * NR + j));
      }
    }
  }
}

// B(k, n) = rows[k][n]. Columns of each chunk come in kernel order: P::restore C's chunks.
template <class P, class R>
void pack_straight(const R& rows, int64_t k, int64_t n, typename P::Unit* to) {
  constexpr int NR = GemmTile<P>::NR, W = P::W, kChunk = P::kChunk;
  const int64_t units = GemmTile<P>::units(k);
  for (int64_t j0 = 0; j0 < n; j0 += NR, to += NR * units) {
    for (int64_t u = 0; u < units; ++u) {
      for (int j = 0; j < NR; j += kChunk) {
        const int left = static_cast<int>(std::clamp<int64_t>(n - j0 - j, 0, kChunk));
        const auto* first = rows[u * P::kPack] + j0 + j;
        const bool pair = P::kPack == 2 && u * 2 + 1 < k;
        const auto* second = pair ? rows[u * 2 + 1] + j0 + j : first;
        const auto none = P::load_n(first, 0);
        const auto x = left == kChunk ? P::load(first) : P::load_n(first, left);
        const auto y = !pair ? none : left == kChunk ? P::load(second) : P::load_n(second, left);
        const auto packed = P::pack_rows(x, y);
        auto* at = reinterpret_cast<char*>(to + u * NR + j);
        std::memcpy(at, &packed.a, sizeof packed.a);
        std::memcpy(at + W * sizeof(typename P::Unit), &packed.b, sizeof packed.b);
      }
    }
  }
}

}  // namespace effops::cpu::EFFOPS_ISA
