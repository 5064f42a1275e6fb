#include "common/team.h"

#include <exception>
#include <thread>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace effops {
namespace {

inline void pause() {
#if defined(__x86_64__)
  _mm_pause();
#endif
}

// A worker is inside a loop only if it found it open after it had announced itself; the leader leaves a loop once it
// has closed it and nobody is inside. Both sides write first and then look, in one order for all (seq_cst).
struct Team {
  alignas(64) std::atomic<uint64_t> loop{0};  // odd while one is open
  std::atomic<bool> over{false};
  Parallel::Body body = nullptr;
  void* context = nullptr;
  alignas(64) std::atomic<int> inside{0};

  void lead(Parallel::Body next, void* next_context) {
    body = next;
    context = next_context;
    ++loop;
    next(next_context, 0);
    ++loop;
    while (inside != 0) pause();
  }

  void work(int64_t index) {
    uint64_t done = 0;
    for (int64_t waited = 0; !over; ++waited) {
      const uint64_t now = loop;
      if (now % 2 == 0 || now == done) {
        waited < kPatience ? pause() : std::this_thread::yield();
        continue;
      }
      ++inside;
      if (loop == now) body(context, index);
      --inside;
      done = now;
      waited = 0;
    }
  }

  static constexpr int64_t kPatience = 20000;  // pauses, some hundred microseconds
};

thread_local Team* leading = nullptr;

struct Start {
  const Parallel& parallel;
  void (*lead)(void*, const Parallel&);
  void* context;
  Team team;
  std::exception_ptr error;

  void run() {
    Team* const before = leading;
    leading = &team;
    try {
      lead(context, {parallel.threads, [](int, Parallel::Body body, void* c) { leading->lead(body, c); }});
    } catch (...) {
      error = std::current_exception();
    }
    leading = before;
    team.over = true;
  }
};

}  // namespace

void run_team(const Parallel& parallel, void (*lead)(void*, const Parallel&), void* context) {
  if (parallel.threads <= 1 || parallel.fork == nullptr) return lead(context, parallel);
  Start start{parallel, lead, context, {}, {}};
  parallel.fork(
      parallel.threads,
      [](void* c, int64_t t) {
        Start& s = *static_cast<Start*>(c);
        t == 0 ? s.run() : s.team.work(t);
      },
      &start);
  if (start.error) std::rethrow_exception(start.error);
}

}  // namespace effops
