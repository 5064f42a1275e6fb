// Which drafted nodes of a token tree stay, and the token after them: the same on every instruction set.
#pragma once

#include "common/parallel.h"
#include "common/views.h"

namespace effops {

template <class T>
struct Strided {  // up to three dimensions; strides in elements
  const T* data = nullptr;
  int64_t stride[3] = {};

  EFFOPS_HD T at(int64_t i, int64_t j = 0, int64_t k = 0) const {
    return data[i * stride[0] + j * stride[1] + k * stride[2]];
  }
};

// How the children of a node were drafted.
enum class Siblings { iid, without_replacement, deterministic };

struct VerifyProblem {
  const char* op = "";  // for messages about rows that are no law
  int64_t batch = 0, tokens = 0, vocab = 0;
  TokenIndices parents;                      // without fault (tree.h); batch stride 0: one tree for all
  Strided<int64_t> draft_tokens;             // [batch, tokens]; inside the vocabulary where there is one
  Strided<int64_t> target_tokens;            // [batch, tokens], greedy
  Strided<float> draft_probs, target_probs;  // [batch, tokens, vocab]
  Strided<double> uniforms;                  // [batch, tokens + 1]; typical: [batch], or null for the argmax
  Siblings siblings = Siblings::deterministic;
  double epsilon = 0, delta = 0;  // typical
  // Contiguous results: [batch, tokens] padded with -1, [batch], [batch].
  int32_t *nodes = nullptr, *count = nullptr;
  int64_t* next_token = nullptr;
};

// A row that is no law, as one number: the row of the target's or of the draft's laws, b * tokens + i.
struct LawFlaw {
  int64_t row = 0;
  bool draft = false;

  EFFOPS_HD int64_t code() const { return row * 2 + draft; }
  static LawFlaw of(int64_t code) { return {code / 2, code % 2 != 0}; }
};
// Throws what is wrong with that row.
[[noreturn]] void report(const VerifyProblem& p, LawFlaw flaw);

void verify_greedy(const VerifyProblem& p);
// These throw std::runtime_error where a row that they read has a negative entry or no positive sum.
void verify_rejection(const VerifyProblem& p, const Parallel& parallel);
void verify_typical(const VerifyProblem& p, const Parallel& parallel);

}  // namespace effops
