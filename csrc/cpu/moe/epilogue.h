// What becomes of the products of a tile of 32 columns: scale, bias, activation.
#pragma once

#include "cpu/moe/activation.h"
#include "cpu/moe/pack.h"

namespace effops::cpu::EFFOPS_ISA {

inline bool halves_gated(const GroupedProblem& p) { return p.gated && !p.interleaved; }

// Tiles of a product: 32 columns, or sixteen features' gates and their up values.
inline int64_t tiles_of(const GroupedProblem& p) {
  const int64_t count = halves_gated(p) ? p.out / 2 : p.out, each = halves_gated(p) ? TileColumns::kRun : kPanel;
  return (count + each - 1) / each;
}
inline int64_t features_a_tile(const GroupedProblem& p) { return p.gated ? TileColumns::kRun : kPanel; }

// `limit`: features that the group has.
inline TileColumns columns_of(const GroupedProblem& p, int64_t tile, int64_t limit) {
  constexpr int64_t kRun = TileColumns::kRun;
  auto within = [&](int64_t left) { return static_cast<int>(std::clamp<int64_t>(left, 0, kRun)); };
  if (halves_gated(p)) {
    const int64_t first = tile * kRun;
    return {{first, p.out / 2 + first}, {within(p.out / 2 - first), within(p.out / 2 - first)}};
  }
  const int64_t first = tile * kPanel;
  return {{first, first + kRun}, {within(limit - first), within(limit - first - kRun)}};
}

template <class T>
class TileEpilogue {
  using V = vec_of<T>;
  using C = typename V::scalar;

 public:
  TileEpilogue(const GroupedProblem& p, int64_t group, const TileColumns& columns) : p_(p) {
    const T* bias = reinterpret_cast<const T*>(p.bias);
    for (int j = 0; j < kPanel; ++j) {
      const int64_t at = group * p.out + columns(j);
      scale_[j] = p.scale != nullptr ? C(p.scale[at]) : C(1);
      bias_[j] = bias != nullptr ? C(to_float(bias[at])) : C(0);
    }
    plain_ = p.scale == nullptr && p.bias == nullptr;
  }

  // One row of products to the features of the tile, 16 if gated, else 32; `to` may be the row itself.
  void row(const C* c, C* to) const {
    C all[kPanel];
    if (!plain_) {
      for (int j = 0; j < kPanel; j += V::width)
        fmadd(V::load(c + j), V::load(scale_ + j), V::load(bias_ + j)).store(all + j);
      c = all;
    }
    if (!p_.gated) {
      for (int j = 0; j < kPanel; j += V::width) {
        const V x = V::load(c + j);
        (p_.activation == Activation::none ? x : activated(p_.activation, x, V::set1(C(1)))).store(to + j);
      }
      return;
    }
    C apart[kPanel];
    if (p_.interleaved) {
      for (int j = 0; j < TileColumns::kRun; ++j) {
        apart[j] = c[2 * j];
        apart[TileColumns::kRun + j] = c[2 * j + 1];
      }
      c = apart;
    }
    for (int j = 0; j < TileColumns::kRun; j += V::width)
      activated(p_.activation, V::load(c + j), V::load(c + TileColumns::kRun + j)).store(to + j);
  }

 private:
  const GroupedProblem& p_;
  C scale_[kPanel], bias_[kPanel];
  bool plain_;
};

// x rounded to T, as P sees it.
template <class T, class V>
inline void store_rounded(V x, typename product_of<T>::Element* to) {
  if constexpr (std::is_same_v<typename product_of<T>::Element, T>) {
    x.store(to);
  } else {
    T rounded[V::width];
    x.store(rounded);
    V::load(rounded).store(to);
  }
}

}  // namespace effops::cpu::EFFOPS_ISA
