// Dense bf16 decode attention written for one case alone: 4 query heads a KV head, head dim 128,
// heads-major cache [B, G, L, 128], AVX-512-BF16. The engine is timed against this loop; the gap is
// what its generality costs. Products, tiles and prefetch are those of the engine's streaming loop.
//
// extern "C" decode_bf16(q [B, G*4, 128], k, v [B, G, L, 128], out like q, B, G, L, threads)
#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <vector>

namespace {

constexpr int D = 128, R = 4, kTile = 64, kSplit = 1024;
constexpr int kStretch = 32;  // value rows that both halves of the columns pass over at a time
using u16 = uint16_t;

// Asked for twice, since the processor drops prefetches while its miss buffers are full.
inline void ask(const u16* p) {
  _mm_prefetch(reinterpret_cast<const char*>(p) + 16384, _MM_HINT_T1);
  _mm_prefetch(reinterpret_cast<const char*>(p) + 8192, _MM_HINT_T1);
}

inline __m512bh load(const u16* p) { return (__m512bh)_mm512_loadu_si512(p); }

inline __m512 reduce_each(const __m512 (&a)[16]) {
  __m512 s[8], t[4], u[2];
  for (int i = 0; i < 8; ++i)
    s[i] = _mm512_add_ps(_mm512_unpacklo_ps(a[2 * i], a[2 * i + 1]), _mm512_unpackhi_ps(a[2 * i], a[2 * i + 1]));
  for (int i = 0; i < 4; ++i)
    t[i] =
        _mm512_add_ps(_mm512_shuffle_ps(s[2 * i], s[2 * i + 1], 0x44), _mm512_shuffle_ps(s[2 * i], s[2 * i + 1], 0xee));
  for (int i = 0; i < 2; ++i)
    u[i] = _mm512_add_ps(_mm512_shuffle_f32x4(t[2 * i], t[2 * i + 1], 0x88),
                         _mm512_shuffle_f32x4(t[2 * i], t[2 * i + 1], 0xdd));
  return _mm512_add_ps(_mm512_shuffle_f32x4(u[0], u[1], 0x88), _mm512_shuffle_f32x4(u[0], u[1], 0xdd));
}

inline __m512 exp512(__m512 x) {
  x = _mm512_max_ps(x, _mm512_set1_ps(-87.3f));
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 8);
  __m512 r = _mm512_fmadd_ps(n, _mm512_set1_ps(-0.693359375f), x);
  r = _mm512_fmadd_ps(n, _mm512_set1_ps(2.12194440e-4f), r);
  __m512 p = _mm512_set1_ps(1.3981999507e-3f);
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(8.3334519073e-3f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.1665795894e-2f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.6666665459e-1f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.0000001201e-1f));
  p = _mm512_fmadd_ps(p, _mm512_mul_ps(r, r), _mm512_add_ps(r, _mm512_set1_ps(1)));
  return _mm512_scalef_ps(p, n);
}

inline __m512 fold_max(__m512 a) {
  a = _mm512_max_ps(a, _mm512_shuffle_f32x4(a, a, 0x4e));
  return _mm512_max_ps(a, _mm512_shuffle_f32x4(a, a, 0xb1));
}
inline __m512 fold_add(__m512 a) {
  a = _mm512_add_ps(a, _mm512_shuffle_f32x4(a, a, 0x4e));
  return _mm512_add_ps(a, _mm512_shuffle_f32x4(a, a, 0xb1));
}

struct Partial {
  float o[R][D], m[R], l[R];
};

// Keys [0, n), n a multiple of 4, of one (sequence, KV head).
void split(const u16* q, const u16* k, const u16* v, int64_t n, Partial& out) {
  alignas(64) float s[kTile * R];
  alignas(64) uint32_t p[kTile / 2 * R];
  alignas(64) float o[R * D];
  for (float& x : o) x = 0;
  __m512 m = _mm512_set1_ps(-INFINITY), l = _mm512_setzero_ps();
  const __m512 scale = _mm512_set1_ps(1 / std::sqrt(float(D)));
  for (int64_t first = 0; first < n; first += kTile) {
    const int keys = n - first < kTile ? int(n - first) : kTile;
    for (int j = 0; j < keys; j += 4) {
      const u16* row = k + (first + j) * D;
      __m512 acc[16];
      for (auto& a : acc) a = _mm512_setzero_ps();
#pragma GCC unroll 4
      for (int c = 0; c < D; c += 32) {
        __m512bh x[4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
          x[i] = load(row + i * D + c);
          ask(row + c * 4 + i * 32);
        }
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
          const __m512bh y = load(q + r * D + c);
#pragma GCC unroll 4
          for (int i = 0; i < 4; ++i) acc[i * 4 + r] = _mm512_dpbf16_ps(acc[i * 4 + r], x[i], y);
        }
      }
      _mm512_store_ps(s + j * R, reduce_each(acc));
    }
    __m512 top = m;
    for (int i = 0; i < keys * R; i += 16) {
      const __m512 x = _mm512_mul_ps(_mm512_load_ps(s + i), scale);
      _mm512_store_ps(s + i, x);
      top = _mm512_max_ps(top, x);
    }
    top = fold_max(top);
    const __m512 shrink = exp512(_mm512_sub_ps(m, top));
    l = _mm512_mul_ps(l, shrink);
    m = top;
    // [key][row] -> [key pair][row] of (even key, odd key)
    const __m512i even = _mm512_setr_epi32(0, 1, 2, 3, 8, 9, 10, 11, 0, 0, 0, 0, 0, 0, 0, 0);
    const __m512i odd = _mm512_setr_epi32(4, 5, 6, 7, 12, 13, 14, 15, 0, 0, 0, 0, 0, 0, 0, 0);
    for (int i = 0; i < keys * R; i += 16) {
      const __m512 x = exp512(_mm512_sub_ps(_mm512_load_ps(s + i), top));
      l = _mm512_add_ps(l, x);
      const __m256 a = _mm512_castps512_ps256(_mm512_permutexvar_ps(even, x));
      const __m256 b = _mm512_castps512_ps256(_mm512_permutexvar_ps(odd, x));
      const __m512i w = (__m512i)_mm512_cvtne2ps_pbh(_mm512_castps256_ps512(b), _mm512_castps256_ps512(a));
      const __m128i lo = _mm512_castsi512_si128(w), hi = _mm512_extracti32x4_epi32(w, 2);
      _mm_store_si128(reinterpret_cast<__m128i*>(p + i / 2), _mm_unpacklo_epi16(lo, hi));
      _mm_store_si128(reinterpret_cast<__m128i*>(p + i / 2 + 4), _mm_unpackhi_epi16(lo, hi));
    }
    alignas(64) float alpha[16];
    _mm512_store_ps(alpha, shrink);
    for (int begin = 0; begin < keys; begin += kStretch) {
      const int end = keys - begin < kStretch ? keys : begin + kStretch;
#pragma GCC unroll 2
      for (int c = 0; c < D; c += 64) {
        __m512 acc[2][R][2];
#pragma GCC unroll 2
        for (int d = 0; d < 2; ++d)
#pragma GCC unroll 4
          for (int r = 0; r < R; ++r)
            for (int h = 0; h < 2; ++h)
              acc[d][r][h] = _mm512_mul_ps(_mm512_load_ps(o + (c / 32 + d) * 32 * R + r * 32 + h * 16),
                                           _mm512_set1_ps(begin == 0 ? alpha[r] : 1.0f));
        const u16* row = v + (first + begin) * D + c;
        const u16* next = v + (first + begin) * D + c * (end - begin);
        for (int j = begin; j < end; j += 2, row += 2 * D) {
#pragma GCC unroll 2
          for (int d = 0; d < 2; ++d) {
            const __m512i a = _mm512_loadu_si512(row + d * 32), b = _mm512_loadu_si512(row + D + d * 32);
            ask(next);
            ask(next + 32);
            next += 64;
            const __m512bh lo = (__m512bh)_mm512_unpacklo_epi16(a, b), hi = (__m512bh)_mm512_unpackhi_epi16(a, b);
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) {
              const __m512bh w = (__m512bh)_mm512_set1_epi32(int(p[j / 2 * R + r]));
              acc[d][r][0] = _mm512_dpbf16_ps(acc[d][r][0], lo, w);
              acc[d][r][1] = _mm512_dpbf16_ps(acc[d][r][1], hi, w);
            }
          }
        }
#pragma GCC unroll 2
        for (int d = 0; d < 2; ++d)
#pragma GCC unroll 4
          for (int r = 0; r < R; ++r)
            for (int h = 0; h < 2; ++h) _mm512_store_ps(o + (c / 32 + d) * 32 * R + r * 32 + h * 16, acc[d][r][h]);
      }
    }
  }
  alignas(64) float mm[16], ll[16];
  _mm512_store_ps(mm, m);
  _mm512_store_ps(ll, fold_add(l));
  const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
  for (int r = 0; r < R; ++r) {
    out.m[r] = mm[r];
    out.l[r] = ll[r];
    for (int c = 0; c < D; c += 32) {
      const __m512 a = _mm512_load_ps(o + c * R + r * 32), b = _mm512_load_ps(o + c * R + r * 32 + 16);
      _mm512_storeu_ps(out.o[r] + c, _mm512_permutex2var_ps(a, first, b));
      _mm512_storeu_ps(out.o[r] + c + 16, _mm512_permutex2var_ps(a, second, b));
    }
  }
}

u16 to_bf16(float f) {
  uint32_t u;
  __builtin_memcpy(&u, &f, 4);
  return u16((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

}  // namespace

extern "C" void decode_bf16(const u16* q, const u16* k, const u16* v, u16* out, int64_t B, int64_t G, int64_t L,
                            int64_t threads) {
  const int64_t splits = (L + kSplit - 1) / kSplit, tasks = B * G * splits;
  std::vector<Partial> part(tasks);
  // torch's thread pool when compiled with -fopenmp: threads of our own would compete with its idle, spinning ones.
#pragma omp parallel for schedule(static) num_threads(int(threads))
  for (int64_t i = 0; i < tasks; ++i) {
    const int64_t bg = i / splits, first = i % splits * kSplit;
    const int64_t n = L - first < kSplit ? L - first : kSplit;
    split(q + bg * R * D, k + (bg * L + first) * D, v + (bg * L + first) * D, n, part[i]);
  }
  for (int64_t bg = 0; bg < B * G; ++bg)
    for (int r = 0; r < R; ++r) {
      float m = -INFINITY, l = 0, o[D] = {};
      for (int64_t s = 0; s < splits; ++s) m = std::fmax(m, part[bg * splits + s].m[r]);
      for (int64_t s = 0; s < splits; ++s) {
        const Partial& x = part[bg * splits + s];
        const float w = std::exp(x.m[r] - m);
        l += w * x.l[r];
        for (int d = 0; d < D; ++d) o[d] += w * x.o[r][d];
      }
      for (int d = 0; d < D; ++d) out[(bg * R + r) * D + d] = to_bf16(o[d] / l);
    }
}
