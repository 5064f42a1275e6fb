// The kernels of one instruction set, as a table. Built once an instruction set, chosen at run time.
#pragma once

#include "common/attention_problem.h"
#include "common/experts_problem.h"
#include "common/kv_merge_problem.h"
#include "common/label_problem.h"
#include "common/layer_problem.h"
#include "common/linear_problem.h"
#include "common/mass_problem.h"
#include "common/moe_problem.h"
#include "common/packed_problem.h"
#include "common/page_bounds.h"
#include "common/parallel.h"
#include "common/pim_problem.h"
#include "common/sampling_problem.h"

namespace effops::cpu {

enum class Isa;  // isa.h

struct Kernels {
  void (*attention)(const AttentionProblem&, const Parallel&);
  void (*attention_backward)(const AttentionProblem&, const AttentionGradients&, const Parallel&);
  void (*attention_mass)(const MassProblem&, const Parallel&);
  void (*merge_states)(const MergeProblem&, const Parallel&);
  void (*linear)(const LinearProblem&, const Parallel&);
  void (*packed_linear)(const PackedLinearProblem&, const Parallel&);
  void (*rms_norm)(const RmsNormProblem&, const Parallel&);
  void (*rotary)(const RotaryProblem&, const Parallel&);
  void (*rotary_append)(const RotaryAppendProblem&, const Parallel&);
  void (*silu_mul)(const SiluMulProblem&, const Parallel&);
  void (*add)(const AddProblem&, const Parallel&);
  void (*sampling)(const SamplingProblem&, const Parallel&);
  void (*routing)(const RoutingProblem&, const Parallel&);
  void (*unpermute)(const UnpermuteProblem&, const Parallel&);
  void (*grouped)(const GroupedProblem&, const Parallel&);
  void (*grouped_gradient)(const GroupedGradientProblem&, const Parallel&);
  void (*experts)(const ExpertsProblem&, const Parallel&);
  void (*kv_merge)(const KvMergeProblem&, const Parallel&);
  void (*label_append)(const LabelAppendProblem&, const Parallel&);
  void (*label_search)(const LabelSearchProblem&, const Parallel&);
  void (*page_append)(const PageAppendProblem&, const Parallel&);
  void (*page_search)(const PageSearchProblem&, const Parallel&);
  void (*pim_gemv)(const PimGemvProblem&, const Parallel&);
};

// The table of an instruction set of this build, and of the one in use (see isa.h).
const Kernels& kernels_of(Isa isa);
const Kernels& kernels();

}  // namespace effops::cpu
