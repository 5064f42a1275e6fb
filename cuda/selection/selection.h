// Launchers of labels and of what they select.
#pragma once

#include "common/label_problem.h"

namespace effops::device {

int label_append(const LabelAppendProblem& p, void* stream);
int64_t label_search_workspace(const LabelSearchProblem& p);
int label_search(const LabelSearchProblem& p, void* workspace, void* stream);

}  // namespace effops::device
