#pragma once

#include "common/parallel.h"

namespace effops::ops {

// torch's thread pool, as wide as torch.set_num_threads says.
Parallel torch_threads();

}  // namespace effops::ops
