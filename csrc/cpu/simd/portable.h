// The vocabulary in GCC/Clang vector extensions: runs on any processor, and carries float64.
#pragma once

#include <cmath>
#include <cstring>

#include "common/dtype.h"
#include "cpu/simd/convert.h"

namespace effops::cpu::EFFOPS_ISA {

template <class C, int W>
struct PortableVec {
  using scalar = C;
  static constexpr int width = W;
  typedef C native __attribute__((vector_size(W * sizeof(C))));
  native v;

  static PortableVec set1(C x) { return {x - native{}}; }
  static PortableVec zero() { return {native{}}; }
  static PortableVec load(const C* p) {
    PortableVec r;
    std::memcpy(&r.v, p, sizeof r.v);
    return r;
  }
  template <class T>
  static PortableVec load(const T* p) {
    PortableVec r;
    for (int i = 0; i < W; ++i) r.v[i] = static_cast<C>(to_float(p[i]));
    return r;
  }
  // The first n <= width elements, the rest zero; nothing beyond them is read.
  template <class T>
  static PortableVec load_n(const T* p, int n) {
    PortableVec r = zero();
    for (int i = 0; i < n; ++i) r.v[i] = static_cast<C>(to_float(p[i]));
    return r;
  }
  // Elements 2i and 2i + 1.
  template <class T>
  static void split(const T* p, PortableVec& even, PortableVec& odd) {
    for (int i = 0; i < W; ++i) {
      even.v[i] = static_cast<C>(to_float(p[2 * i]));
      odd.v[i] = static_cast<C>(to_float(p[2 * i + 1]));
    }
  }
  void store(C* p) const { std::memcpy(p, &v, sizeof v); }
  template <class T>
  void store(T* p) const {
    for (int i = 0; i < W; ++i) p[i] = from_float<T>(static_cast<float>(v[i]));
  }

  friend PortableVec operator+(PortableVec a, PortableVec b) { return {a.v + b.v}; }
  friend PortableVec operator-(PortableVec a, PortableVec b) { return {a.v - b.v}; }
  friend PortableVec operator*(PortableVec a, PortableVec b) { return {a.v * b.v}; }
  friend PortableVec operator/(PortableVec a, PortableVec b) { return {a.v / b.v}; }
  friend PortableVec fmadd(PortableVec a, PortableVec b, PortableVec c) { return {a.v * b.v + c.v}; }
  friend PortableVec max(PortableVec a, PortableVec b) { return {a.v > b.v ? a.v : b.v}; }
  friend PortableVec min(PortableVec a, PortableVec b) { return {a.v < b.v ? a.v : b.v}; }
  friend PortableVec abs(PortableVec a) { return {a.v < 0 ? -a.v : a.v}; }
  // x < limit ? a : b
  friend PortableVec where_less(PortableVec x, PortableVec limit, PortableVec a, PortableVec b) {
    return {x.v < limit.v ? a.v : b.v};
  }
  friend PortableVec round(PortableVec a) {
    for (int i = 0; i < W; ++i) a.v[i] = std::nearbyint(a.v[i]);
    return a;
  }
  // 2^n for integral n in [-126, 127].
  friend PortableVec pow2(PortableVec n) {
    for (int i = 0; i < W; ++i) n.v[i] = std::ldexp(C(1), static_cast<int>(n.v[i]));
    return n;
  }
  friend C reduce_add(PortableVec a) {
    C s[W];
    a.store(s);
    for (int w = W / 2; w > 0; w /= 2)
      for (int i = 0; i < w; ++i) s[i] += s[i + w];
    return s[0];
  }
  // Row i, lane j becomes row j, lane i.
  static void transpose(PortableVec (&a)[W]) {
    for (int i = 0; i < W; ++i)
      for (int j = 0; j < i; ++j) {
        const C x = a[i].v[j];
        a[i].v[j] = a[j].v[i];
        a[j].v[i] = x;
      }
  }
  // Lane i of the result is the sum over the lanes of a[i].
  static PortableVec reduce_add_each(const PortableVec (&a)[W]) {
    PortableVec r;
    for (int i = 0; i < W; ++i) r.v[i] = reduce_add(a[i]);
    return r;
  }
  // Lane i becomes the maximum (sum) over the lanes congruent to i modulo M.
  template <int M>
  static PortableVec fold_max(PortableVec a) {
    for (int i = 0; i < M; ++i)
      for (int j = i; j < W; j += M) a.v[i] = a.v[j] > a.v[i] ? a.v[j] : a.v[i];
    for (int i = M; i < W; ++i) a.v[i] = a.v[i % M];
    return a;
  }
  template <int M>
  static PortableVec fold_add(PortableVec a) {
    for (int i = 0; i < M; ++i)
      for (int j = i + M; j < W; j += M) a.v[i] += a.v[j];
    for (int i = M; i < W; ++i) a.v[i] = a.v[i % M];
    return a;
  }
};

}  // namespace effops::cpu::EFFOPS_ISA
