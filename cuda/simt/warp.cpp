#include "simt/warp.h"

#include "simt/block.h"

namespace effops::device::simt {
namespace {

struct ShuffleOperands {
  uint64_t value, result;
  int argument;
};

int source_lane(Shuffle kind, int lane, int argument, int width) {
  const int first = lane & -width, last = first + width - 1;
  switch (kind) {
    case Shuffle::index:
      return first + (argument & (width - 1));
    case Shuffle::bit_xor:
      return (lane ^ argument) <= last ? lane ^ argument : lane;
    case Shuffle::up:
      return lane - argument >= first ? lane - argument : lane;
    case Shuffle::down:
      return lane + argument <= last ? lane + argument : lane;
  }
  return lane;
}

template <Shuffle kKind>
bool execute_shuffle(Block& b, Warp& w, uint32_t mask, int64_t detail) {
  const int width = static_cast<int>(detail >> 8);
  for (int i = 0; i < kLanes; ++i) {
    if (!(mask >> i & 1)) continue;
    ShuffleOperands& o = *static_cast<ShuffleOperands*>(w.operands[i]);
    const int from = source_lane(kKind, i, o.argument, width);
    if (from < 0 || !(mask >> from & 1))
      b.fail(b.lane(w, i), b.lane(w, i).site, "shuffle from lane %d, which is not in the mask 0x%08x", from, mask);
    o.result = static_cast<const ShuffleOperands*>(w.operands[from])->value;
  }
  return true;
}

const WarpOperation kShuffles[] = {
    {"__shfl_sync", execute_shuffle<Shuffle::index>, false},
    {"__shfl_xor_sync", execute_shuffle<Shuffle::bit_xor>, false},
    {"__shfl_up_sync", execute_shuffle<Shuffle::up>, false},
    {"__shfl_down_sync", execute_shuffle<Shuffle::down>, false},
};

struct VoteOperands {
  bool predicate;
  uint32_t result;
};

template <Vote kKind>
bool execute_vote(Block&, Warp& w, uint32_t mask, int64_t) {
  uint32_t votes = 0;
  for (int i = 0; i < kLanes; ++i)
    if (mask >> i & 1) votes |= uint32_t(static_cast<VoteOperands*>(w.operands[i])->predicate) << i;
  const uint32_t result = kKind == Vote::ballot ? votes : kKind == Vote::any ? votes != 0 : votes == mask;
  for (int i = 0; i < kLanes; ++i)
    if (mask >> i & 1) static_cast<VoteOperands*>(w.operands[i])->result = result;
  return true;
}

const WarpOperation kVotes[] = {
    {"__ballot_sync", execute_vote<Vote::ballot>, false},
    {"__any_sync", execute_vote<Vote::any>, false},
    {"__all_sync", execute_vote<Vote::all>, false},
};

bool execute_sync(Block& b, Warp& w, uint32_t mask, int64_t) {
  b.shadow.sync_lanes(w.index, mask, mask == w.existing);
  return true;
}

const WarpOperation kSyncWarp{"__syncwarp", execute_sync, false};

}  // namespace

uint64_t shuffle(Shuffle kind, uint32_t mask, uint64_t value, int argument, int width, int bytes) {
  const void* site = __builtin_return_address(0);
  if (width < 1 || width > kLanes || (width & (width - 1)))
    current_lane->block->fail(*current_lane, site, "shuffle of width %d: expected a power of two up to 32", width);
  ShuffleOperands o{value, 0, argument};
  meet(mask, kShuffles[int(kind)], width << 8 | bytes, &o, site);
  return o.result;
}

uint32_t vote(Vote kind, uint32_t mask, bool predicate) {
  VoteOperands o{predicate, 0};
  meet(mask, kVotes[int(kind)], 0, &o, __builtin_return_address(0));
  return o.result;
}

void sync_warp(uint32_t mask) { meet(mask, kSyncWarp, 0, nullptr, __builtin_return_address(0)); }

}  // namespace effops::device::simt
