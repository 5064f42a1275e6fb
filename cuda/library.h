// Everything that the ops ask of device code, as one table. The CUDA build of effops links one; libeffops_simt.so, the
// same kernels on the host, exports one.
#pragma once

#include "common/append.h"
#include "common/device_attention_plan.h"
#include "common/evict.h"
#include "common/grouped_problem.h"
#include "common/kv_merge_problem.h"
#include "common/label_problem.h"
#include "common/layer_problem.h"
#include "common/mass_problem.h"
#include "common/moe_problem.h"
#include "common/packed_problem.h"
#include "common/page_bounds.h"
#include "common/pim_problem.h"
#include "common/sampling_problem.h"
#include "common/verify.h"

namespace effops::device {

struct PackProblem {  // parents [batch, tokens] into contiguous ancestors [batch, tokens, words] and depths
  int64_t batch = 0, tokens = 0;
  TokenIndices parents;
  int64_t* ancestors = nullptr;
  int32_t* depths = nullptr;
};

// Index values that are out of range are absent: no kernel reads or writes memory through them. The flaw of a row that
// is no law (`flaw`, where given) is the least report, as an unsigned number; its memory holds kNoFlaw before the
// launch.
inline constexpr int64_t kNoFlaw = -1;

struct DeviceLibrary {
  const char* name;  // cuda, simt

  // Statuses: 0, or what `error` explains. Workspaces are 256-byte aligned and may be null where 0 bytes are asked.
  const char* (*error)(int status);
  int64_t (*attention_workspace)(const AttentionProblem&, const AttentionLimits&);
  int (*attention)(const AttentionProblem&, const AttentionLimits&, void* workspace, void* stream);
  int64_t (*attention_backward_workspace)(const AttentionProblem&, const AttentionLimits&);
  int (*attention_backward)(const AttentionProblem&, const AttentionGradients&, const AttentionLimits&, void* workspace,
                            void* stream);
  int (*attention_mass)(const MassProblem&, const AttentionLimits&, void* stream);
  int (*merge_states)(const MergeProblem&, void* stream);
  int (*append_rows)(const AppendProblem&, void* stream);
  int (*append_evicting)(const EvictProblem&, void* stream);
  int64_t (*kv_merge_workspace)(const KvMergeProblem&);
  int (*kv_merge)(const KvMergeProblem&, void* workspace, void* stream);
  int (*commit_rows)(const CommitProblem&, void* stream);
  int (*packed_linear)(const PackedLinearProblem&, void* stream);  // without norm and gate
  int (*add)(const AddProblem&, void* stream);
  int (*rms_norm)(const RmsNormProblem&, void* stream);
  int (*rotary)(const RotaryProblem&, void* stream);
  int (*rotary_append)(const RotaryAppendProblem&, void* stream);
  int (*silu_mul)(const SiluMulProblem&, void* stream);
  int (*sampling)(const SamplingProblem&, int64_t* flaw, void* stream);  // flaw: row * 4 + RowFlaw; without `best`
  int (*pack_ancestors)(const PackProblem&, void* stream);
  int (*verify_greedy)(const VerifyProblem&, void* stream);
  int64_t (*verify_workspace)(const VerifyProblem&);  // of the two that follow
  int (*verify_rejection)(const VerifyProblem&, void* workspace, int64_t* flaw, void* stream);  // flaw: LawFlaw
  int (*verify_typical)(const VerifyProblem&, void* workspace, int64_t* flaw, void* stream);
  int (*topk_routing)(const RoutingProblem&, void* stream);
  int64_t (*sort_slots_workspace)(const SlotSortProblem&);
  int (*sort_slots)(const SlotSortProblem&, void* workspace, void* stream);
  int (*permute_rows)(const PermuteProblem&, void* stream);
  int (*unpermute_rows)(const UnpermuteProblem&, void* stream);
  int64_t (*grouped_workspace)(const GroupedProblem&);
  int (*grouped)(const GroupedProblem&, void* workspace, void* stream);
  int64_t (*grouped_gradient_workspace)(const GroupedGradientProblem&);
  int (*grouped_gradient)(const GroupedGradientProblem&, void* workspace, void* stream);
  int (*label_append)(const LabelAppendProblem&, void* stream);
  int64_t (*label_search_workspace)(const LabelSearchProblem&);
  int (*label_search)(const LabelSearchProblem&, void* workspace, void* stream);
  int (*page_append)(const PageAppendProblem&, void* stream);
  int64_t (*page_search_workspace)(const PageSearchProblem&);
  int (*page_search)(const PageSearchProblem&, void* workspace, void* stream);
  int (*pim_gemv)(const PimGemvProblem&, void* stream);
};

}  // namespace effops::device

extern "C" const effops::device::DeviceLibrary* effops_device_library();
