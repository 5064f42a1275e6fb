// How kernels reach threads without knowing who owns them: torch's pool in the extension,
// std::thread in sanitizer builds, the caller alone when there is little to do. Thread 0 helps with the work of all
// others, so that it does not matter which of them come.
#pragma once

#include <atomic>
#include <cstdint>
#include <exception>
#include <memory>
#include <type_traits>

namespace effops {

struct Parallel {
  using Body = void (*)(void* context, int64_t index);

  int threads = 1;
  // Runs body(context, t) once for t = 0 and at most once for each other t below threads, possibly at the same time.
  void (*fork)(int threads, Body body, void* context) = nullptr;

  // Runs body(i) for every i in [0, tasks). Each thread starts on a contiguous range of its own and
  // helps with the others' when done: neighbours in memory stay on one core, imbalance is evened out.
  template <class F>
  void for_each(int64_t tasks, bool worth_threads, F&& body) const {
    if (threads <= 1 || tasks <= 1 || !worth_threads || fork == nullptr) {
      for (int64_t i = 0; i < tasks; ++i) body(i);
      return;
    }
    struct alignas(64) Range {
      std::atomic<int64_t> next;
      int64_t end;
    };
    struct Job {
      std::remove_reference_t<F>* body;
      Range* ranges;
      int threads;
      std::atomic<bool> failed{false};
      std::exception_ptr error;
    };
    constexpr int kFew = 16;  // the usual case costs no allocation
    Range few[kFew];
    std::unique_ptr<Range[]> many;
    if (threads > kFew) many = std::make_unique<Range[]>(threads);
    Job job{&body, threads > kFew ? many.get() : few, threads, {}, {}};
    for (int t = 0; t < threads; ++t) {
      job.ranges[t].next = tasks * t / threads;
      job.ranges[t].end = tasks * (t + 1) / threads;
    }
    fork(
        threads,
        [](void* context, int64_t t) {
          Job& j = *static_cast<Job*>(context);
          try {
            for (int k = 0; k < j.threads; ++k) {
              Range& r = j.ranges[(t + k) % j.threads];
              for (int64_t i; !j.failed && (i = r.next.fetch_add(1, std::memory_order_relaxed)) < r.end;) (*j.body)(i);
            }
          } catch (...) {  // the first error is kept: torch's pool would lose its text
            if (!j.failed.exchange(true)) j.error = std::current_exception();
          }
        },
        &job);
    if (job.error) std::rethrow_exception(job.error);
  }
};

}  // namespace effops
