#include "cpu/kernel_list.h"
#include "cpu/moe/experts.h"
#include "cpu/moe/gradient.h"
#include "cpu/moe/routing.h"
#include "cpu/moe/unpermute.h"

namespace effops::cpu::EFFOPS_ISA {

EFFOPS_KERNEL(routing, RoutingProblem, p.dtype)
EFFOPS_KERNEL(unpermute, UnpermuteProblem, p.dtype)
EFFOPS_KERNEL(grouped, GroupedProblem, p.dtype)
EFFOPS_KERNEL(grouped_gradient, GroupedGradientProblem, p.dtype)
EFFOPS_KERNEL(experts, ExpertsProblem, p.gate_up.dtype)

}  // namespace effops::cpu::EFFOPS_ISA
