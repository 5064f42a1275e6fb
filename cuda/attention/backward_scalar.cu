#include "attention/backward_launch.h"
#include "attention/backward_scalar_keys.h"
#include "attention/backward_scalar_queries.h"

namespace effops::device {

template <>
int launch_backward_keys<float>(const BackwardParams& p, void* stream) {
  return with_columns<64, 128, 256>(max_of(p.a.p.head_dim, p.a.p.v_dim), [&](auto columns) {
    using Loop = ScalarKeys<columns()>;
    return launch<BackwardParams>(
        {"scalar_backward_keys", key_grid(p, Loop::kOwn, 1), Loop::kThreads, kKeyBlockBytes + Loop::kBytes, stream},
        &scalar_backward_keys<columns()>, p);
  });
}

template <>
int launch_backward_queries<float>(const BackwardParams& p, void* stream) {
  return with_columns<64, 128, 256>(max_of(p.a.p.head_dim, p.a.p.v_dim), [&](auto columns) {
    using Loop = ScalarQueries<columns()>;
    return launch<BackwardParams>(
        {"scalar_backward_queries", query_grid(p, Loop::kOwn), Loop::kThreads, kRowBlockBytes + Loop::kBytes, stream},
        &scalar_backward_queries<columns()>, p);
  });
}

}  // namespace effops::device
