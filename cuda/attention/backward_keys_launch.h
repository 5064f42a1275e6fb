#pragma once

#include "attention/backward_keys.h"
#include "attention/backward_launch.h"

namespace effops::device {

template <class T>
int launch_backward_keys(const BackwardParams& p, void* stream) {
  return with_columns<64, 96, 128, 192, 256>(max_of(p.a.p.head_dim, p.a.p.v_dim), [&](auto columns) {
    using Tiles = BackwardTiles<T, columns()>;
    const dim3 grid = key_grid(p, Tiles::kOwn, kKeyPasses<columns()>);
    return launch<BackwardParams>({"backward_keys", grid, Tiles::kThreads, kKeyBlockBytes + Tiles::kBytes, stream},
                                  &backward_keys<T, columns()>, p);
  });
}

}  // namespace effops::device
