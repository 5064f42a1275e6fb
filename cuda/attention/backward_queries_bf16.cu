#include "attention/backward_queries_launch.h"

namespace effops::device {

template int launch_backward_queries<bf16>(const BackwardParams&, void*);

}  // namespace effops::device
