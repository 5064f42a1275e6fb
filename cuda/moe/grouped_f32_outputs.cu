#include "moe/grouped_launch.h"

namespace effops::device {

template int launch_grouped<float, float, false>(const GroupedParams&, const GroupedPlan&, void*);

}  // namespace effops::device
