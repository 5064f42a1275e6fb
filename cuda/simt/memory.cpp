#include "simt/memory.h"

#include <bit>

#include "simt/block.h"
#include "simt/stacks.h"

namespace effops::device::simt {
namespace {

constexpr uintptr_t kNullPage = 4096;

const char* name_of(Access kind) {
  return kind == Access::read ? "read" : kind == Access::atomic ? "atomic access" : "write";
}

// Fills in where the address lies next to the nearest extent, and ends the block.
[[noreturn]] void fail_global(Lane& lane, uintptr_t begin, int64_t bytes, bool write, const void* site) {
  Block& b = *lane.block;
  const char* verb = write ? "write" : "read";
  const NamedExtent* nearest = nullptr;
  uintptr_t distance = UINTPTR_MAX;
  for (const NamedExtent& e : *b.grid->extents) {
    const uintptr_t d = begin < e.begin ? e.begin - begin : begin < e.end ? 0 : begin - e.end;
    if (d >= distance) continue;
    nearest = &e;
    distance = d;
  }
  if (!nearest) b.fail(lane, site, "global %s of %d bytes at address %p", verb, int(bytes), (void*)begin);
  const long long offset = static_cast<long long>(begin - nearest->begin);
  const long long size = static_cast<long long>(nearest->end - nearest->begin);
  if (write && !nearest->writable && begin >= nearest->begin && begin + bytes <= nearest->end)
    b.fail(lane, site, "global write of %d bytes at offset %lld of the read-only '%s' (%lld bytes)", int(bytes), offset,
           nearest->name.c_str(), size);
  b.fail(lane, site, "global %s of %d bytes out of bounds: at offset %lld of '%s', which has %lld bytes", verb,
         int(bytes), offset, nearest->name.c_str(), size);
}

void check_blocks(Lane& lane, const NamedExtent& e, uintptr_t begin, int64_t bytes, Access kind, const void* site) {
  Block& b = *lane.block;
  if (kind == Access::atomic) b.uses_global_atomics = true;
  if (!b.grid->global_shadow || b.uses_global_atomics) return;
  const int64_t offset = static_cast<int64_t>(begin - e.begin);
  const int64_t other = b.grid->global_shadow->access(b.linear, e.place + offset, bytes, kind == Access::write);
  if (other < 0) return;
  const uint3 at = b.grid->block_at(other);
  b.fail(lane, site,
         "race: %s of %lld bytes at offset %lld of '%s', which block (%u, %u, %u) has %s in the same launch",
         name_of(kind), static_cast<long long>(bytes), static_cast<long long>(offset), e.name.c_str(), at.x, at.y, at.z,
         kind == Access::write ? "accessed" : "written");
}

}  // namespace

void check_global(Lane& lane, const void* address, int64_t bytes, Access kind, const void* site) {
  Block& b = *lane.block;
  const bool write = kind != Access::read;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(address), end = begin + bytes;
  const auto inside = [&](const NamedExtent& e) { return begin >= e.begin && end <= e.end && (!write || e.writable); };
  const NamedExtent* found = b.last_extent && inside(*b.last_extent) ? b.last_extent : nullptr;
  if (!found) {
    if (b.grid->extents->empty() && begin >= kNullPage) return;
    for (const NamedExtent& e : *b.grid->extents)
      if (!found && inside(e)) b.last_extent = found = &e;
  }
  if (found) {
    if (found->writable) check_blocks(lane, *found, begin, bytes, kind, site);
    return;
  }
  const Kernel& kernel = b.grid->kernel;
  const uintptr_t body = reinterpret_cast<uintptr_t>(kernel.body);
  if (!write && begin >= body && end <= body + kernel.body_bytes) return;
  if (!write && b.grid->module->holds_constant(begin, end)) return;
  fail_global(lane, begin, bytes, write, site);
}

int64_t shared_offset(Lane& lane, const void* address, int64_t bytes, const char* operation, const void* site) {
  Block& b = *lane.block;
  const int64_t offset = static_cast<const char*>(address) - b.shared.begin(), size = b.grid->kernel.shared_bytes;
  if (offset < 0 || offset + bytes > size)
    b.fail(lane, site, "%s of %d bytes out of bounds: at offset %lld of the %lld bytes of shared memory", operation,
           int(bytes), static_cast<long long>(offset), static_cast<long long>(size));
  return offset;
}

void check_access(Lane& lane, const void* address, int64_t bytes, Access kind, bool aligned, const void* site) {
  const uintptr_t at = reinterpret_cast<uintptr_t>(address);
  if (at - lane.stack < kStackBytes) return;
  Block& b = *lane.block;
  if (aligned && at % bytes) b.fail(lane, site, "misaligned %s of %d bytes at %p", name_of(kind), int(bytes), address);
  if (!b.grid->check) return;
  if (!b.shared.owns(at)) return check_global(lane, address, bytes, kind, site);
  const int64_t inside = shared_offset(lane, address, bytes, name_of(kind), site);
  if (b.grid->track) b.shadow.access(lane, inside, bytes, kind, site);
  // A larger one is several instructions.
  if (b.grid->banks && bytes <= 16 && std::has_single_bit(uint64_t(bytes)))
    lane.warp->accesses.add(lane.index, site, inside, static_cast<int>(bytes));
}

void check_aligned(const void* p, int bytes) {
  if (reinterpret_cast<uintptr_t>(p) % bytes)
    current_lane->block->fail(*current_lane, __builtin_return_address(0), "misaligned access of %d bytes at %p", bytes,
                              p);
}

}  // namespace effops::device::simt
