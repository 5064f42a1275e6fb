#include "cpu/gemv/banked.h"
#include "cpu/gemv/linear.h"
#include "cpu/gemv/packed_linear.h"
#include "cpu/kernel_list.h"

namespace effops::cpu::EFFOPS_ISA {

EFFOPS_KERNEL(linear, LinearProblem, p.dtype)
EFFOPS_KERNEL(pim_gemv, PimGemvProblem, p.dtype)

// Float64 has no quantised weights.
void packed_linear(const PackedLinearProblem& p, const Parallel& parallel) {
  switch (p.linear.dtype) {
    case DType::bf16:
      return packed_linear_typed<bf16>(p, parallel);
    case DType::f16:
      return packed_linear_typed<f16>(p, parallel);
    default:
      return packed_linear_typed<float>(p, parallel);
  }
}

}  // namespace effops::cpu::EFFOPS_ISA
