// Many short parallel loops in a row, in one parallel region: threads wait for the next loop instead of being started
// for it.
#pragma once

#include <type_traits>

#include "common/parallel.h"

namespace effops {

// Runs lead(context, parallel) on the caller, while the other threads of `parallel` wait for the loops that it starts
// on the Parallel it was given. A thread that comes late to a loop, or never, is not waited for.
void run_team(const Parallel& parallel, void (*lead)(void* context, const Parallel& parallel), void* context);

template <class F>
void with_team(const Parallel& parallel, F&& body) {
  run_team(
      parallel, [](void* c, const Parallel& team) { (*static_cast<std::remove_reference_t<F>*>(c))(team); }, &body);
}

}  // namespace effops
