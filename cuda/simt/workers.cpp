#include "simt/workers.h"

#include <condition_variable>
#include <mutex>
#include <thread>

namespace effops::device::simt {
namespace {

struct Pool {
  std::mutex in_use;  // by one launch
  std::mutex mutex;
  std::condition_variable wanted, finished;
  int threads = 0, open = 0, running = 0;  // open: how many may still join the work
  void (*work)(void*) = nullptr;
  void* context = nullptr;

  void serve() {
    std::unique_lock<std::mutex> lock(mutex);
    for (;;) {
      wanted.wait(lock, [&] { return open > 0; });
      --open;
      lock.unlock();
      work(context);
      lock.lock();
      if (--running == 0) finished.notify_one();
    }
  }
};

}  // namespace

void run_on_workers(int others, void (*work)(void*), void* context) {
  static Pool& pool = *new Pool;  // threads wait in it until the process ends
  const std::unique_lock<std::mutex> own(pool.in_use, std::try_to_lock);
  if (others == 0 || !own) return work(context);
  {
    const std::lock_guard<std::mutex> lock(pool.mutex);
    for (; pool.threads < others; ++pool.threads) std::thread([] { pool.serve(); }).detach();
    pool.work = work;
    pool.context = context;
    pool.open = pool.running = others;
  }
  pool.wanted.notify_all();
  work(context);
  std::unique_lock<std::mutex> lock(pool.mutex);
  // Who has not come by now finds nothing left to do.
  pool.running -= pool.open;
  pool.open = 0;
  pool.finished.wait(lock, [&] { return pool.running == 0; });
}

}  // namespace effops::device::simt
