#include "moe/grouped_launch.h"

namespace effops::device {

template int launch_grouped<float, float, true>(const GroupedParams&, const GroupedPlan&, void*);

}  // namespace effops::device
