#include "moe/grouped_launch.h"

namespace effops::device {

template int launch_grouped<bf16, bf16, false>(const GroupedParams&, const GroupedPlan&, void*);

}  // namespace effops::device
