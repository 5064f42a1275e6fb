#include "cpu/attention/attention.h"
#include "cpu/attention/backward.h"
#include "cpu/attention/mass.h"
#include "cpu/kernel_list.h"

namespace effops::cpu::EFFOPS_ISA {

EFFOPS_KERNEL(attention, AttentionProblem, p.dtype)
EFFOPS_KERNEL(attention_mass, MassProblem, p.attention.dtype)

void attention_backward(const AttentionProblem& p, const AttentionGradients& g, const Parallel& parallel) {
  by_dtype(p.dtype, [&](auto* t) { attention_backward_typed<std::remove_pointer_t<decltype(t)>>(p, g, parallel); });
}

}  // namespace effops::cpu::EFFOPS_ISA
