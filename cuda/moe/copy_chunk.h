// Sixteen bytes of a row to shared memory: past the registers where its address is fit for it.
#pragma once

#include "primitives/copy_async.h"
#include "primitives/element.h"

namespace effops::device {

// The first `count` elements (what is more than 16 bytes of them is left out), and zeros. No address is formed of
// `from` where count is not positive. A copy_commit has to follow.
struct CopyPiece {
  static constexpr bool kPieces = true;
  template <class T>
  __device__ void operator()(char* to, const T* from, int count) const {
    const int bytes = clamp_to(count, 0, kItems16<T>) * static_cast<int>(sizeof(T));
    copy_async(to, bytes ? from : nullptr, bytes);
  }
};
struct CopyItems {
  static constexpr bool kPieces = false;
  template <class T>
  __device__ void operator()(char* to, const T* from, int count) const {
    Items<T, kItems16<T>>::load_some(from, count, false).store(reinterpret_cast<T*>(to));
  }
};

// copy_one(i, how) for i of [0, N): unrolled where rows are fit for pieces.
template <int N, class CopyOne>
__device__ void copy_all(bool pieces, CopyOne&& copy_one) {
  if (pieces) {
    EFFOPS_UNROLL
    for (int i = 0; i < N; ++i) copy_one(i, CopyPiece());
  } else {
    EFFOPS_KEEP_LOOP
    for (int i = 0; i < N; ++i) copy_one(i, CopyItems());
  }
}

}  // namespace effops::device
