#include "attention/block_launch.h"

namespace effops::device {

template int launch_block<f16>(const AttentionParams&, void*);

}  // namespace effops::device
