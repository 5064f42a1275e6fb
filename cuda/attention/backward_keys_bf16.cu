#include "attention/backward_keys_launch.h"

namespace effops::device {

template int launch_backward_keys<bf16>(const BackwardParams&, void*);

}  // namespace effops::device
