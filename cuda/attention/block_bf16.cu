#include "attention/block_launch.h"

namespace effops::device {

template int launch_block<bf16>(const AttentionParams&, void*);

}  // namespace effops::device
