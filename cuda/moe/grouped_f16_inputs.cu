#include "moe/grouped_launch.h"

namespace effops::device {

template int launch_grouped<f16, f16, true>(const GroupedParams&, const GroupedPlan&, void*);

}  // namespace effops::device
