// Launchers of labels and bounds of pages, and of what they select.
#pragma once

#include "common/label_problem.h"
#include "common/page_bounds.h"

namespace effops::device {

int label_append(const LabelAppendProblem& p, void* stream);
int64_t label_search_workspace(const LabelSearchProblem& p);
int label_search(const LabelSearchProblem& p, void* workspace, void* stream);
int page_append(const PageAppendProblem& p, void* stream);
int64_t page_search_workspace(const PageSearchProblem& p);
int page_search(const PageSearchProblem& p, void* workspace, void* stream);

}  // namespace effops::device
