// The attention engine's driver: tasks of the plan go to one of the two loops, splits join after.
#pragma once

#include "common/parallel.h"
#include "cpu/attention/block.h"
#include "cpu/attention/stream.h"

namespace effops::cpu::EFFOPS_ISA {

template <class T>
void attention_typed(const AttentionProblem& p, const Parallel& parallel) {
  using C = typename vec_of<T>::scalar;
  const AttentionPlan plan = plan_attention(p);
  const int64_t tasks = int64_t(plan.tasks.size());
  // Every partial row is written by its task before it is read.
  C* partials = nullptr;
  if (plan.partial_rows > 0)
    partials = static_cast<C*>(thread_scratch(Scratch::call, plan.partial_rows * partial_stride(p) * sizeof(C)));
  parallel.for_each(tasks, plan.multiplications > kSerialWork, [&](int64_t i) {
    const AttentionTask& task = plan.tasks[i];
    if (streams(sequence_of(p, task.sequence).q_len * p.group(), p.head_dim)) {
      StreamTask<T>(p, task, partials).run();
    } else {
      block_task<T>(p, task, partials);
    }
  });
  if (plan.partial_rows == 0) return;
  parallel.for_each(tasks, plan.partial_rows * p.v_dim > kSerialWork, [&](int64_t i) {
    const AttentionTask& task = plan.tasks[i];
    if (task.splits == 1 || task.first_tile != 0) return;
    join_splits<T>(p, task, partials, static_cast<C*>(thread_scratch(Scratch::task, p.v_dim * sizeof(C))));
  });
}

}  // namespace effops::cpu::EFFOPS_ISA
