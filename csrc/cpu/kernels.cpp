// Compiled once an instruction set: the only symbol that leaves is the table.
#include "cpu/kernels.h"

#include "cpu/attention/attention.h"
#include "cpu/attention/backward.h"
#include "cpu/gemv/linear.h"
#include "cpu/layer/layer.h"
#include "cpu/sampling/sampling.h"

#define EFFOPS_CONCAT_(a, b) a##b
#define EFFOPS_CONCAT(a, b) EFFOPS_CONCAT_(a, b)

namespace effops::cpu::EFFOPS_ISA {
namespace {

// Calls f with a null pointer of the storage type.
template <class F>
void by_dtype(DType t, F&& f) {
  switch (t) {
    case DType::f32:
      return f(static_cast<float*>(nullptr));
    case DType::bf16:
      return f(static_cast<bf16*>(nullptr));
    case DType::f16:
      return f(static_cast<f16*>(nullptr));
    case DType::f64:
      return f(static_cast<double*>(nullptr));
  }
}

#define EFFOPS_KERNEL(name, Problem)                                                                    \
  void name(const Problem& p, const Parallel& parallel) {                                               \
    by_dtype(p.dtype, [&](auto* t) { name##_typed<std::remove_pointer_t<decltype(t)>>(p, parallel); }); \
  }

EFFOPS_KERNEL(attention, AttentionProblem)
EFFOPS_KERNEL(merge_states, MergeProblem)
EFFOPS_KERNEL(linear, LinearProblem)
EFFOPS_KERNEL(rms_norm, RmsNormProblem)
EFFOPS_KERNEL(rotary, RotaryProblem)
EFFOPS_KERNEL(rotary_append, RotaryAppendProblem)
EFFOPS_KERNEL(silu_mul, SiluMulProblem)
EFFOPS_KERNEL(add, AddProblem)
EFFOPS_KERNEL(sampling, SamplingProblem)

void attention_backward(const AttentionProblem& p, const AttentionGradients& g, const Parallel& parallel) {
  by_dtype(p.dtype, [&](auto* t) { attention_backward_typed<std::remove_pointer_t<decltype(t)>>(p, g, parallel); });
}

}  // namespace
}  // namespace effops::cpu::EFFOPS_ISA

extern "C" __attribute__((visibility("hidden"))) const effops::cpu::Kernels EFFOPS_CONCAT(effops_cpu_, EFFOPS_ISA) = {
    &effops::cpu::EFFOPS_ISA::attention,     &effops::cpu::EFFOPS_ISA::attention_backward,
    &effops::cpu::EFFOPS_ISA::merge_states,  &effops::cpu::EFFOPS_ISA::linear,
    &effops::cpu::EFFOPS_ISA::rms_norm,      &effops::cpu::EFFOPS_ISA::rotary,
    &effops::cpu::EFFOPS_ISA::rotary_append, &effops::cpu::EFFOPS_ISA::silu_mul,
    &effops::cpu::EFFOPS_ISA::add,           &effops::cpu::EFFOPS_ISA::sampling,
};
