#include "moe/grouped_gradient_launch.h"

namespace effops::device {

template int launch_grouped_gradient<bf16>(const GradientParams&, void*);

}  // namespace effops::device
