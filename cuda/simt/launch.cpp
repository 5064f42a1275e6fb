// Runs the blocks of a launch and says what went wrong.
#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstring>
#include <mutex>
#include <numeric>

#include "simt/block.h"
#include "simt/segv.h"
#include "simt/settings.h"
#include "simt/workers.h"

namespace effops::device::simt {
namespace {

constexpr int kStatusFault = 1, kStatusInvalid = 2;

#ifdef EFFOPS_SIMT_UNTRACKED
constexpr bool kTracked = false;  // a kernel's plain accesses are a sanitizer's
#else
constexpr bool kTracked = true;
#endif

struct Outcome {
  std::string report;
  int64_t bank_conflicts = 0;
};
Outcome& outcome() {
  static thread_local Outcome last;
  return last;
}

// Blocks that no launch uses just now. They are never freed: their stacks serve again.
class BlockPool {
 public:
  Block& take() {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (free_.empty()) return *new Block;
    Block& b = *free_.back();
    free_.pop_back();
    return b;
  }
  void give_back(Block& b) {
    const std::lock_guard<std::mutex> lock(mutex_);
    free_.push_back(&b);
  }

 private:
  std::mutex mutex_;
  std::vector<Block*> free_;
};

struct Job {
  Grid grid{};
  int64_t blocks = 0;
  std::vector<uint32_t> order;  // empty: as they come
  std::atomic<int64_t> next{0};
  std::atomic<bool> failed{false};
  std::mutex mutex;
  Fault fault;  // of the first block that failed
  int64_t bank_conflicts = 0;
};

BlockPool& block_pool() {
  static BlockPool& pool = *new BlockPool;
  return pool;
}

void run_blocks(void* context) {
  Job& job = *static_cast<Job*>(context);
  Block& block = block_pool().take();
  const AlternateStack stack;
  adopt_thread_stack(block.scheduler);
  block.bank_conflicts = 0;
  while (!job.failed) {
    const int64_t i = job.next++;
    if (i >= job.blocks) break;
    if (block.run(job.grid, job.order.empty() ? i : job.order[i])) continue;
    const std::lock_guard<std::mutex> lock(job.mutex);
    if (!job.failed || block.fault.linear < job.fault.linear) job.fault = block.fault;
    job.failed = true;
  }
  {
    const std::lock_guard<std::mutex> lock(job.mutex);
    job.bank_conflicts += block.bank_conflicts;
  }
  block_pool().give_back(block);
}

void shuffle_blocks(Job& job) {
  job.order.resize(job.blocks);
  std::iota(job.order.begin(), job.order.end(), 0u);
  uint64_t state = job.grid.seed;
  for (int64_t i = job.blocks - 1; i > 0; --i) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    std::swap(job.order[i], job.order[(state >> 33) % (i + 1)]);
  }
}

std::string invalid(const Kernel& k) {
  char text[256] = "";
  if (k.threads < 1 || k.threads > kMostThreads)
    std::snprintf(text, sizeof text, "%d threads a block: expected 1 to %d", k.threads, kMostThreads);
  else if (k.shared_bytes < 0 || k.shared_bytes > kMostShared)
    std::snprintf(text, sizeof text, "%lld bytes of shared memory: expected at most %lld",
                  static_cast<long long>(k.shared_bytes), static_cast<long long>(kMostShared));
  else if (k.grid.x > 0x7fffffffu || k.grid.y > 65535 || k.grid.z > 65535)
    std::snprintf(text, sizeof text, "a grid of %u x %u x %u blocks: expected at most 2147483647 x 65535 x 65535",
                  k.grid.x, k.grid.y, k.grid.z);
  return text;
}

std::string describe(const Grid& grid, const Fault& f) {
  char head[256];
  std::snprintf(head, sizeof head,
                "simt: kernel %s, block (%u, %u, %u), thread %d (warp %d, lane %d): ", grid.kernel.name, f.block.x,
                f.block.y, f.block.z, f.thread, f.thread / kLanes, f.thread % kLanes);
  std::string text = head + std::string(f.text);
  if (f.site) text += "\n  at " + describe_site(*grid.module, f.site);
  if (f.other) text += "\n  the other at " + describe_site(*grid.module, f.other);
  return text;
}

}  // namespace

int launch(const Kernel& kernel) {
  Outcome& result = outcome();
  result = {};
  const std::string wrong = invalid(kernel);
  if (!wrong.empty()) {
    result.report = "simt: kernel " + std::string(kernel.name) + ": " + wrong;
    return kStatusInvalid;
  }
  const Settings settings = current_settings();
  const Module& module = module_of(reinterpret_cast<const void*>(kernel.run));
  ExtentList& extents = registered_extents();
  Job job;
  job.blocks = int64_t(kernel.grid.x) * kernel.grid.y * kernel.grid.z;
  job.grid.kernel = kernel;
  job.grid.module = &module;
  job.grid.extents = &extents.all;
  job.grid.check = settings.check;
  job.grid.track = settings.check && kTracked;
  job.grid.banks = settings.check && settings.banks;
  job.grid.shuffled = settings.shuffled;
  job.grid.seed = settings.seed;
  if (job.blocks == 0) return 0;
  if (job.grid.track && extents.writable_bytes > 0 && extents.writable_bytes <= GlobalShadow::kMostBytes &&
      job.blocks > 1) {
    job.grid.global_shadow = &extents.shadow;
    extents.shadow.begin_launch(extents.writable_bytes, job.blocks);
  }
  if (settings.shuffled) shuffle_blocks(job);
  watch_for_segv();
  run_on_workers(static_cast<int>(std::min<int64_t>(settings.threads, job.blocks)) - 1, run_blocks, &job);
  result.bank_conflicts = job.bank_conflicts;
  if (!job.failed) return 0;
  result.report = describe(job.grid, job.fault);
  return kStatusFault;
}

const char* last_report() { return outcome().report.c_str(); }
int64_t last_bank_conflicts() { return outcome().bank_conflicts; }

}  // namespace effops::device::simt
