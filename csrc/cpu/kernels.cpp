// Compiled once an instruction set, like the other kernels.cpp: the only symbol that leaves is the table.
#include "cpu/kernel_list.h"
#include "cpu/layer/layer.h"
#include "cpu/sampling/sampling.h"

#define EFFOPS_CONCAT_(a, b) a##b
#define EFFOPS_CONCAT(a, b) EFFOPS_CONCAT_(a, b)

namespace effops::cpu::EFFOPS_ISA {

EFFOPS_KERNEL(merge_states, MergeProblem, p.dtype)
EFFOPS_KERNEL(rms_norm, RmsNormProblem, p.dtype)
EFFOPS_KERNEL(rotary, RotaryProblem, p.dtype)
EFFOPS_KERNEL(rotary_append, RotaryAppendProblem, p.dtype)
EFFOPS_KERNEL(silu_mul, SiluMulProblem, p.dtype)
EFFOPS_KERNEL(add, AddProblem, p.dtype)
EFFOPS_KERNEL(sampling, SamplingProblem, p.dtype)

}  // namespace effops::cpu::EFFOPS_ISA

extern "C" __attribute__((visibility("hidden"))) const effops::cpu::Kernels EFFOPS_CONCAT(effops_cpu_, EFFOPS_ISA) = {
    &effops::cpu::EFFOPS_ISA::attention,
    &effops::cpu::EFFOPS_ISA::attention_backward,
    &effops::cpu::EFFOPS_ISA::attention_mass,
    &effops::cpu::EFFOPS_ISA::merge_states,
    &effops::cpu::EFFOPS_ISA::linear,
    &effops::cpu::EFFOPS_ISA::packed_linear,
    &effops::cpu::EFFOPS_ISA::rms_norm,
    &effops::cpu::EFFOPS_ISA::rotary,
    &effops::cpu::EFFOPS_ISA::rotary_append,
    &effops::cpu::EFFOPS_ISA::silu_mul,
    &effops::cpu::EFFOPS_ISA::add,
    &effops::cpu::EFFOPS_ISA::sampling,
    &effops::cpu::EFFOPS_ISA::routing,
    &effops::cpu::EFFOPS_ISA::unpermute,
    &effops::cpu::EFFOPS_ISA::grouped,
    &effops::cpu::EFFOPS_ISA::grouped_gradient,
    &effops::cpu::EFFOPS_ISA::experts,
    &effops::cpu::EFFOPS_ISA::kv_merge,
    &effops::cpu::EFFOPS_ISA::label_append,
    &effops::cpu::EFFOPS_ISA::label_search,
    &effops::cpu::EFFOPS_ISA::page_append,
    &effops::cpu::EFFOPS_ISA::page_search,
    &effops::cpu::EFFOPS_ISA::pim_gemv,
};
