// Launchers of the writes into KV caches.
#pragma once

#include "common/append.h"
#include "common/evict.h"
#include "common/kv_merge_problem.h"

namespace effops::device {

int append_rows(const AppendProblem& p, void* stream);
int append_evicting(const EvictProblem& p, void* stream);
int64_t kv_merge_workspace(const KvMergeProblem& p);
int kv_merge(const KvMergeProblem& p, void* workspace, void* stream);
int commit_rows(const CommitProblem& p, void* stream);

}  // namespace effops::device
