#pragma once

#include "attention/backward_launch.h"
#include "attention/backward_queries.h"

namespace effops::device {

template <class T>
int launch_backward_queries(const BackwardParams& p, void* stream) {
  return with_columns<64, 96, 128, 192, 256>(max_of(p.a.p.head_dim, p.a.p.v_dim), [&](auto columns) {
    using Tiles = BackwardTiles<T, columns()>;
    const dim3 grid = query_grid(p, Tiles::kOwn);
    return launch<BackwardParams>({"backward_queries", grid, Tiles::kThreads, kRowBlockBytes + Tiles::kBytes, stream},
                                  &backward_queries<T, columns()>, p);
  });
}

}  // namespace effops::device
