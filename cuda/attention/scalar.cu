#include "attention/scalar.h"

#include "attention/launch.h"

namespace effops::device {

int launch_scalar(const AttentionParams& a, void* stream) {
  const dim3 grid(static_cast<unsigned>(row_blocks_in_all(a, kStreamRows)), static_cast<unsigned>(a.p.kv_heads),
                  static_cast<unsigned>(a.splits));
  return with_columns<64, 128, 256>(max_of(a.p.head_dim, a.p.v_dim), [&](auto columns) {
    using Loop = Scalar<columns()>;
    return launch<AttentionParams>({"scalar_attention", grid, Loop::kThreads, Loop::kSharedBytes, stream},
                                   &scalar_attention<columns()>, a);
  });
}

}  // namespace effops::device
