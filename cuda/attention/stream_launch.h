#pragma once

#include "attention/launch.h"
#include "attention/stream.h"

namespace effops::device {

template <class T>
int launch_stream(const AttentionParams& a, void* stream) {
  const dim3 grid(static_cast<unsigned>(a.p.batch), static_cast<unsigned>(a.p.kv_heads),
                  static_cast<unsigned>(a.splits));
  return with_columns<64, 96, 128, 192, 256>(max_of(a.p.head_dim, a.p.v_dim), [&](auto columns) {
    using Loop = Stream<T, columns()>;
    return launch<AttentionParams>({"stream_attention", grid, Loop::kThreads, Loop::kSharedBytes, stream},
                                   &stream_attention<T, columns()>, a);
  });
}

}  // namespace effops::device
