// Warp operations: lanes that a mask names meet, and the last one to come does the work of all.
#pragma once

#include <cstdint>

namespace effops::device::simt {

struct Block;
struct Lane;
struct Warp;

struct WarpOperation {
  const char* name;
  // `operands` of the lanes in `mask`; whether they go on at once.
  bool (*execute)(Block& b, Warp& w, uint32_t mask, int64_t detail);
  bool whole_warp;  // needs all 32 lanes
};

struct WarpGroup {
  uint32_t mask, arrived;
  const WarpOperation* operation;
  int64_t detail;  // what has to be equal in all lanes
  const void* site;
};

void meet(uint32_t mask, const WarpOperation& operation, int64_t detail, void* operands, const void* site);

// No lane may leave that others wait for.
void check_exit(const Lane& self);

}  // namespace effops::device::simt
