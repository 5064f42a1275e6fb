// Shuffles, votes and __syncwarp.
#pragma once

#include <bit>

#include "simt/language.h"

namespace effops::device::simt {

enum class Shuffle { index, bit_xor, up, down };
enum class Vote { ballot, any, all };

uint64_t shuffle(Shuffle kind, uint32_t mask, uint64_t value, int argument, int width, int bytes);
uint32_t vote(Vote kind, uint32_t mask, bool predicate);
void sync_warp(uint32_t mask);

template <class T>
__forceinline__ T shuffle(Shuffle kind, uint32_t mask, T x, int argument, int width) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "shuffles take values of 4 or 8 bytes");
  if constexpr (sizeof(T) == 4)
    return std::bit_cast<T>(uint32_t(shuffle(kind, mask, std::bit_cast<uint32_t>(x), argument, width, 4)));
  else return std::bit_cast<T>(shuffle(kind, mask, std::bit_cast<uint64_t>(x), argument, width, 8));
}

}  // namespace effops::device::simt

template <class T>
__forceinline__ T __shfl_sync(unsigned mask, T x, int lane, int width = 32) {
  return effops::device::simt::shuffle(effops::device::simt::Shuffle::index, mask, x, lane, width);
}
template <class T>
__forceinline__ T __shfl_xor_sync(unsigned mask, T x, int bits, int width = 32) {
  return effops::device::simt::shuffle(effops::device::simt::Shuffle::bit_xor, mask, x, bits, width);
}
template <class T>
__forceinline__ T __shfl_up_sync(unsigned mask, T x, unsigned delta, int width = 32) {
  return effops::device::simt::shuffle(effops::device::simt::Shuffle::up, mask, x, int(delta), width);
}
template <class T>
__forceinline__ T __shfl_down_sync(unsigned mask, T x, unsigned delta, int width = 32) {
  return effops::device::simt::shuffle(effops::device::simt::Shuffle::down, mask, x, int(delta), width);
}
__forceinline__ unsigned __ballot_sync(unsigned mask, int predicate) {
  return effops::device::simt::vote(effops::device::simt::Vote::ballot, mask, predicate != 0);
}
__forceinline__ int __any_sync(unsigned mask, int predicate) {
  return int(effops::device::simt::vote(effops::device::simt::Vote::any, mask, predicate != 0));
}
__forceinline__ int __all_sync(unsigned mask, int predicate) {
  return int(effops::device::simt::vote(effops::device::simt::Vote::all, mask, predicate != 0));
}
__forceinline__ void __syncwarp(unsigned mask = 0xffffffffu) { effops::device::simt::sync_warp(mask); }
