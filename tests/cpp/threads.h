// Parallel on std::thread: true concurrency that ThreadSanitizer understands.
#pragma once

#include <thread>
#include <vector>

#include "common/parallel.h"

namespace effops::test {

inline Parallel std_threads(int threads) {
  return {threads, [](int count, Parallel::Body body, void* context) {
            std::vector<std::thread> others;
            for (int t = 1; t < count; ++t) others.emplace_back(body, context, t);
            body(context, 0);
            for (std::thread& t : others) t.join();
          }};
}

}  // namespace effops::test
