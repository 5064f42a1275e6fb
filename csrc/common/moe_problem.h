// Routing of tokens to experts and the moves between token order and expert order, free of torch. Strides are in
// elements. A slot is one choice of one token: slot t * k + j is choice j of token t.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/host_device.h"

namespace effops {

enum class Scoring : int8_t { softmax, sigmoid };

struct RoutingProblem {
  DType dtype = DType::f32;
  int64_t tokens = 0, experts = 0, k = 0;
  const char* logits = nullptr;
  int64_t token = 0, expert = 0;  // strides of logits
  Scoring scoring = Scoring::softmax;
  bool renormalize = true;  // weights of a token sum to `scale`
  double scale = 1;
  const float* bias = nullptr;            // [experts]: counts in the selection, not in the weights
  int64_t groups = 1, chosen_groups = 1;  // experts compete within the best groups only
  bool two_best = false;                  // a group's score: the sum of its two best, or its best
  float* weights = nullptr;               // [tokens, k], float64 where logits are
  int32_t* ids = nullptr;                 // [tokens, k]
};

struct SlotSortProblem {  // stable: slots of an expert keep their order
  int64_t tokens = 0, k = 0, experts = 0;
  const int32_t* ids = nullptr;   // -1, and on devices all that is no expert: dropped
  int64_t token = 0, choice = 0;  // strides of ids
  int32_t* order = nullptr;       // [slots]: the slot at each place, dropped ones last
  int32_t* inverse = nullptr;     // [slots]: the place of each slot, -1 for a dropped one
  int32_t* offsets = nullptr;     // [experts]: the end of each expert's places

  EFFOPS_HD int64_t slots() const { return tokens * k; }
};

struct PermuteProblem {  // y[i] = x[order[i] / k], zero past the last expert's end
  DType dtype = DType::f32;
  int64_t slots = 0, k = 1, dim = 0, experts = 0;
  const char* x = nullptr;
  int64_t x_row = 0;
  const int32_t *order = nullptr, *offsets = nullptr;
  char* y = nullptr;  // contiguous
};

struct UnpermuteProblem {  // out[t] = sum over j of weights[t, j] y[inverse[t, j]], j ascending; -1 adds nothing
  DType dtype = DType::f32;
  int64_t tokens = 0, k = 1, dim = 0, slots = 0;
  const char* y = nullptr;  // [slots, dim]
  int64_t y_row = 0;
  const char* weights = nullptr;  // [tokens, k] contiguous, float32 (float64 for float64), or null for ones
  const int32_t* inverse = nullptr;
  char* out = nullptr;  // contiguous
};

}  // namespace effops
