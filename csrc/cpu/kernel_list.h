// The kernels of one instruction set by name: what the files beside this one define, and kernels.cpp tabulates.
#pragma once

#include "cpu/kernels.h"

namespace effops::cpu::EFFOPS_ISA {

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

// name(problem, parallel) by name_typed<T>, T chosen by `dtype`.
#define EFFOPS_KERNEL(name, Problem, dtype)                                                           \
  void name(const Problem& p, const Parallel& parallel) {                                             \
    by_dtype(dtype, [&](auto* t) { name##_typed<std::remove_pointer_t<decltype(t)>>(p, parallel); }); \
  }

void attention(const AttentionProblem&, const Parallel&);
void attention_backward(const AttentionProblem&, const AttentionGradients&, const Parallel&);
void attention_mass(const MassProblem&, const Parallel&);
void merge_states(const MergeProblem&, const Parallel&);
void linear(const LinearProblem&, const Parallel&);
void packed_linear(const PackedLinearProblem&, const Parallel&);
void rms_norm(const RmsNormProblem&, const Parallel&);
void rotary(const RotaryProblem&, const Parallel&);
void rotary_append(const RotaryAppendProblem&, const Parallel&);
void silu_mul(const SiluMulProblem&, const Parallel&);
void add(const AddProblem&, const Parallel&);
void sampling(const SamplingProblem&, const Parallel&);
void routing(const RoutingProblem&, const Parallel&);
void unpermute(const UnpermuteProblem&, const Parallel&);
void grouped(const GroupedProblem&, const Parallel&);
void grouped_gradient(const GroupedGradientProblem&, const Parallel&);
void experts(const ExpertsProblem&, const Parallel&);
void kv_merge(const KvMergeProblem&, const Parallel&);
void label_append(const LabelAppendProblem&, const Parallel&);
void label_search(const LabelSearchProblem&, const Parallel&);
void page_append(const PageAppendProblem&, const Parallel&);
void page_search(const PageSearchProblem&, const Parallel&);
void pim_gemv(const PimGemvProblem&, const Parallel&);

}  // namespace effops::cpu::EFFOPS_ISA
