// What has happened to every byte of a block's shared memory: who wrote it last and who has read it since. Finds races,
// uninitialised reads and accesses to copies under way.
#pragma once

#include <cstdint>
#include <memory>

#include "simt/clocks.h"

namespace effops::device::simt {

struct Lane;

enum class Access { read, write, atomic, copy_issue, copy_landing };

class Shadow {
 public:
  Clocks clocks;

  void begin_block(int warps);
  void sync_block() { clocks.sync_block(); }
  void sync_lanes(int warp, uint32_t mask, bool all) { clocks.sync_lanes(warp, mask, all); }

  // Ends the block with a report where the access is wrong. Within bounds.
  void access(Lane& lane, int64_t offset, int64_t bytes, Access kind, const void* site);

 private:
  // One for each unit of a 16-byte chunk. Units are as large as all accesses to the chunk since it was last written
  // as a whole allow: tiles are mostly used in whole chunks.
  struct Cell {
    uint32_t clock[3];  // of the last write and of two reads by different threads
    uint32_t site[3];
    uint16_t thread[3];
    bool in_flight, atomic;
  };
  template <Access kKind>
  struct Visit;
  template <Access kKind>
  void visit_all(const Visit<kKind>& visit);

  Cell& cell(int64_t offset, int64_t unit) { return unit == kChunk ? chunks_[offset / kChunk] : units_[offset]; }
  void refine(int64_t chunk, int unit);

  static constexpr int64_t kChunk = 16;
  std::unique_ptr<Cell[]> chunks_;
  std::unique_ptr<Cell[]> units_;
  std::unique_ptr<uint8_t[]> unit_bytes_;
};

}  // namespace effops::device::simt
