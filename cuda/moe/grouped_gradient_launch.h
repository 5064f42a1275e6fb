#pragma once

#include "moe/grouped_gradient_tiles.h"

namespace effops::device {

template <class T>
int launch_grouped_gradient(const GradientParams& a, void* stream) {
  constexpr int64_t kMostBlocks = 0x7fffffff;
  const dim3 grid(static_cast<unsigned>(min_of(a.tiles, kMostBlocks)));
  return launch<GradientParams>({"grouped_gradient", grid, kGroupedThreads, GradientTiles<T>::kSharedBytes, stream},
                                &grouped_gradient_tiles<T>, a);
}

}  // namespace effops::device
