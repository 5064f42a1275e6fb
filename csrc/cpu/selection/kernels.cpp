#include "cpu/kernel_list.h"
#include "cpu/selection/kv_merge.h"
#include "cpu/selection/label_append.h"
#include "cpu/selection/label_search.h"
#include "cpu/selection/page_append.h"
#include "cpu/selection/page_search.h"

namespace effops::cpu::EFFOPS_ISA {

EFFOPS_KERNEL(kv_merge, KvMergeProblem, p.dtype)
EFFOPS_KERNEL(label_append, LabelAppendProblem, p.dtype)
EFFOPS_KERNEL(page_append, PageAppendProblem, p.dtype)
EFFOPS_KERNEL(page_search, PageSearchProblem, p.dtype)

void label_search(const LabelSearchProblem& p, const Parallel& parallel) {
  if (p.format.bits != 0) return label_search_of<int32_t>(p, parallel);
  switch (p.format.dtype) {
    case DType::bf16:
      return label_search_of<bf16>(p, parallel);
    case DType::f16:
      return label_search_of<f16>(p, parallel);
    default:
      return label_search_of<float>(p, parallel);
  }
}

}  // namespace effops::cpu::EFFOPS_ISA
