// Launchers of the ops on token trees.
#pragma once

#include "library.h"

namespace effops::device {

int pack_ancestors(const PackProblem& p, void* stream);
int verify_greedy(const VerifyProblem& p, void* stream);

int64_t verify_workspace(const VerifyProblem& p);
int verify_rejection(const VerifyProblem& p, void* workspace, int64_t* flaw, void* stream);
int verify_typical(const VerifyProblem& p, void* workspace, int64_t* flaw, void* stream);

}  // namespace effops::device
