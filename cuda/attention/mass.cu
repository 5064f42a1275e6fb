#include "attention/mass.h"

#include "attention/launch.h"
#include "attention/mass_scalar.h"
#include "attention/mass_tiles.h"

namespace effops::device {
namespace {

template <class Loop>
__global__ void __launch_bounds__(Loop::kThreads) accumulate_mass(const __grid_constant__ MassParams p) {
  const KeyBlock* block = own_key_block(p.a, p.key_blocks, Loop::kOwn);
  if (block && block->begin < block->end) Loop(p, *block, shared_memory() + kKeyBlockBytes).run();
}

template <class T, template <class, int> class Loop>
int run(const MassProblem& m, const AttentionLimits& limits, void* stream) {
  return with_columns<64, 128, 256>(m.attention.head_dim, [&](auto columns) {
    using Own = Loop<T, columns()>;
    MassParams p{shared_params<T>(m.attention, limits), m.mass,
                 static_cast<int>((limits.max_kv_len + Own::kOwn - 1) / Own::kOwn)};
    const dim3 grid(static_cast<unsigned>(key_blocks_in_all(p.a, p.key_blocks, Own::kOwn)),
                    static_cast<unsigned>(m.attention.kv_heads));
    return launch<MassParams>({"accumulate_mass", grid, Own::kThreads, kKeyBlockBytes + Own::kBytes, stream},
                              &accumulate_mass<Own>, p);
  });
}

}  // namespace

int attention_mass(const MassProblem& m, const AttentionLimits& limits, void* stream) {
  const AttentionProblem& p = m.attention;
  if (p.head_dim > kLargestHead || p.dtype == DType::f64) return kUnsupported;
  if (p.batch == 0 || p.q_len == 0) return 0;
  switch (p.dtype) {
    case DType::bf16:
      return run<bf16, MassTiles>(m, limits, stream);
    case DType::f16:
      return run<f16, MassTiles>(m, limits, stream);
    default:
      return run<float, MassScalar>(m, limits, stream);
  }
}

}  // namespace effops::device
