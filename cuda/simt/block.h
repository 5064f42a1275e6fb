// The thread block that an operating-system thread runs just now: a fiber a CUDA thread. A fiber runs until it has to
// wait; then the next one that is ready runs. Nothing here is ever seen by two operating-system threads at a time.
#pragma once

#include <cstdarg>
#include <memory>

#include "simt/arena.h"
#include "simt/banks.h"
#include "simt/context.h"
#include "simt/copies.h"
#include "simt/fault.h"
#include "simt/grid.h"
#include "simt/mma_scratch.h"
#include "simt/named_barriers.h"
#include "simt/rendezvous.h"
#include "simt/shadow.h"

namespace effops::device::simt {

inline constexpr int kLanes = 32, kMostWarps = 32, kMostThreads = kLanes * kMostWarps;

struct Block;
struct Warp;

struct Lane {
  Context context;
  uintptr_t stack = 0;
  Block* block = nullptr;
  Warp* warp = nullptr;
  int thread = 0;
  int index = 0;  // in its warp

  // What it waits at.
  enum class Wait : uint8_t { nothing, warp, block, named };
  Wait wait = Wait::nothing;
  const void* site = nullptr;
  bool finished = false;

  Copies copies;
  uint32_t bit() const { return 1u << index; }
};

struct Warp {
  uint32_t existing = 0, exited = 0, ready = 0;
  int index = 0;
  int groups = 0;  // that wait
  WarpGroup group[kLanes];
  void* operands[kLanes];
  WarpAccesses accesses;
};

struct BlockBarrier {
  int arrived = 0;
  const char* file = nullptr;
  int line = 0;
  const void* site = nullptr;
};

struct Block {
  const Grid* grid = nullptr;
  uint3 index{};
  int64_t linear = 0;

  Context scheduler;
  std::unique_ptr<Lane> lanes[kMostThreads];
  Warp warps[kMostWarps];
  uint32_t ready_warps = 0;
  int threads = 0, warp_count = 0, exited = 0, stacks = 0;
  uint64_t random = 0;

  Arena shared;
  Shadow shadow;
  BlockBarrier barrier;
  NamedBarriers named;
  const NamedExtent* last_extent = nullptr;
  bool uses_global_atomics = false;
  std::unique_ptr<MmaScratch> mma = std::make_unique<MmaScratch>();
  Fault fault;
  int64_t bank_conflicts = 0;

  Block() {
    for (int w = 0; w < kMostWarps; ++w) warps[w].index = w;
  }
  // Whether all went well; `fault` tells the rest.
  bool run(const Grid& g, int64_t number);

  // Runs others until this lane is ready again.
  void park(Lane& self);
  void make_ready(Warp& w, uint32_t lanes) {
    w.ready |= lanes;
    if (lanes) ready_warps |= 1u << w.index;
  }
  // At every meeting of a warp, and at its end.
  void count_conflicts(Warp& w) {
    if (grid->banks) bank_conflicts += w.accesses.take();
  }
  // After a wait that `self` has ended for others: in a random order it need not be the first to go on.
  void after_release(Lane& self) {
    if (!grid->shuffled) return;
    make_ready(*self.warp, self.bit());
    park(self);
  }
  void report(const Lane& lane, const void* site, const char* format, ...) __attribute__((format(printf, 4, 5)));
  // Ends the block: it is given up where it stands, and no destructor of a fiber runs.
  [[noreturn]] void fail(const Lane& lane, const void* site, const char* format, ...)
      __attribute__((format(printf, 4, 5)));
  Lane& lane(const Warp& w, int i) { return *lanes[w.index * kLanes + i]; }

 private:
  void begin(const Grid& g, int64_t number);
  Lane* next(const Warp* preferred);
  void exit_lane(Lane& self);
  void diagnose();
  void write_report(const Lane& lane, const void* site, const char* format, va_list arguments);
  static void fiber();
};

// The fiber that runs on this operating-system thread, if any. Part of the static TLS block: one instruction away.
extern __thread Lane* current_lane __attribute__((tls_model("initial-exec")));

}  // namespace effops::device::simt
