#include "simt/block.h"

#include <bit>
#include <cstdarg>
#include <cstdio>

#include "simt/stacks.h"

namespace effops::device::simt {

__thread Lane* current_lane = nullptr;

namespace {

// Stacks that began on the same offset of a page would all fall on the same lines of the L1 cache.
size_t stack_offset(int thread) { return size_t(thread) * 7 % 64 * 64; }

uint64_t mixed(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

int random_bit(uint64_t& state, uint32_t of) {
  state = state * 6364136223846793005u + 1442695040888963407u;
  int skip = static_cast<int>((state >> 33) % std::popcount(of));
  while (skip-- > 0) of &= of - 1;
  return std::countr_zero(of);
}

}  // namespace

void Block::begin(const Grid& g, int64_t number) {
  grid = &g;
  linear = number;
  index = g.block_at(number);
  threads = g.kernel.threads;
  warp_count = (threads + kLanes - 1) / kLanes;
  exited = 0;
  ready_warps = 0;
  random = mixed(g.seed + 0x9e3779b97f4a7c15u * uint64_t(number + 1));
  barrier = {};
  last_extent = nullptr;
  uses_global_atomics = false;
  fault.happened = false;
  fault.other = nullptr;
  named.reset();
  shadow.begin_block(warp_count);
  shared.begin_block(g.kernel.shared_bytes);
  for (int w = 0; w < warp_count; ++w) {
    Warp& warp = warps[w];
    const int lanes_here = std::min(threads - w * kLanes, kLanes);
    warp.existing = lanes_here == kLanes ? ~0u : (1u << lanes_here) - 1;
    warp.exited = 0;
    warp.ready = 0;
    warp.groups = 0;
    make_ready(warp, warp.existing);
  }
  while (stacks < warp_count * kLanes) {
    char* memory = new_stacks(kLanes);
    for (int i = 0; i < kLanes; ++i, ++stacks) {
      Lane& l = *(lanes[stacks] = std::make_unique<Lane>());
      l.block = this;
      l.warp = &warps[stacks / kLanes];
      l.thread = stacks;
      l.index = i;
      l.stack = reinterpret_cast<uintptr_t>(memory + i * stack_step());
    }
  }
  for (int t = 0; t < threads; ++t) {
    Lane& l = *lanes[t];
    l.wait = Lane::Wait::nothing;
    l.copies.reset();
    prepare(l.context, reinterpret_cast<char*>(l.stack), kStackBytes, stack_offset(t), &Block::fiber, !l.finished);
    l.finished = false;
  }
}

bool Block::run(const Grid& g, int64_t number) {
  begin(g, number);
  Lane* first = next(nullptr);
  current_lane = first;
  switch_context(scheduler, first->context);
  // Back here: all have exited, or one has failed, or none is ready.
  current_lane = nullptr;
  if (!fault.happened && exited < threads) diagnose();
  for (int w = 0; w < warp_count; ++w) count_conflicts(warps[w]);
  return !fault.happened;
}

Lane* Block::next(const Warp* preferred) {
  if (!ready_warps) return nullptr;
  Warp* w;
  int i;
  if (grid->shuffled) {
    w = &warps[random_bit(random, ready_warps)];
    i = random_bit(random, w->ready);
  } else {
    w = preferred && preferred->ready ? &warps[preferred->index] : &warps[std::countr_zero(ready_warps)];
    i = std::countr_zero(w->ready);
  }
  w->ready &= ~(1u << i);
  if (!w->ready) ready_warps &= ~(1u << w->index);
  return lanes[w->index * kLanes + i].get();
}

void Block::park(Lane& self) {
  Lane* other = next(self.warp);
  if (other == &self) return;
  current_lane = other;
  switch_context(self.context, other ? other->context : scheduler);
}

void Block::exit_lane(Lane& self) {
  self.copies.check_finished(self);
  check_exit(self);
  self.finished = true;
  self.warp->exited |= self.bit();
  ++exited;
  Lane* other = next(self.warp);
  current_lane = other;
  leave_context(self.context, other ? other->context : scheduler);
}

void Block::fiber() {
  entered();
  Lane& self = *current_lane;
  const Kernel& kernel = self.block->grid->kernel;
  kernel.run(kernel.body);
  self.block->exit_lane(self);
}

void Block::write_report(const Lane& l, const void* site, const char* format, va_list arguments) {
  fault.happened = true;
  fault.block = index;
  fault.linear = linear;
  fault.thread = l.thread;
  fault.site = site;
  std::vsnprintf(fault.text, sizeof fault.text, format, arguments);
}

void Block::report(const Lane& l, const void* site, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  write_report(l, site, format, arguments);
  va_end(arguments);
}

void Block::fail(const Lane& l, const void* site, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  write_report(l, site, format, arguments);
  va_end(arguments);
  Lane& self = *current_lane;
  current_lane = nullptr;
  leave_context(self.context, scheduler);
}

uint3 thread_index() { return {unsigned(current_lane->thread), 0, 0}; }
uint3 block_index() { return current_lane->block->index; }
uint3 block_size() { return {unsigned(current_lane->block->threads), 1, 1}; }
uint3 grid_size() {
  const dim3& g = current_lane->block->grid->kernel.grid;
  return {g.x, g.y, g.z};
}
char* shared_memory() { return current_lane->block->shared.begin(); }

}  // namespace effops::device::simt
