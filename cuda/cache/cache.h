// Launchers of the writes into KV caches.
#pragma once

#include "common/append.h"
#include "common/evict.h"

namespace effops::device {

int append_rows(const AppendProblem& p, void* stream);
int append_evicting(const EvictProblem& p, void* stream);
int commit_rows(const CommitProblem& p, void* stream);

}  // namespace effops::device
