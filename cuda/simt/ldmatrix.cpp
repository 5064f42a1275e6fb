#include <cstring>

#include "simt/block.h"
#include "simt/memory.h"

namespace effops::device::simt {
namespace {

constexpr int kMatrixRows = 8, kRowBytes = 16;

struct LdmatrixOperands {
  uint32_t* to;
  const void* const* rows;
};

// The usual case, at once.
bool covers_all_banks(const int64_t (&offsets)[kMatrixRows]) {
  unsigned used = 0;
  for (int64_t offset : offsets) used |= 1u << (offset / kRowBytes % kMatrixRows);
  return used == (1u << kMatrixRows) - 1;
}

template <bool kTransposed>
void read_matrix(Block& b, Warp& w, int four, int matrix) {
  int64_t offsets[kMatrixRows];
  uint16_t values[kMatrixRows][kMatrixRows];
  for (int r = 0; r < kMatrixRows; ++r) {
    Lane& lane = b.lane(w, matrix * kMatrixRows + r);
    const void* row = static_cast<const LdmatrixOperands*>(w.operands[lane.index])->rows[four];
    if (reinterpret_cast<uintptr_t>(row) % kRowBytes)
      b.fail(lane, lane.site, "misaligned row of ldmatrix at %p: expected a multiple of 16", row);
    offsets[r] = shared_offset(lane, row, kRowBytes, "ldmatrix", lane.site);
    if (b.grid->track) b.shadow.access(lane, offsets[r], kRowBytes, Access::read, lane.site);
    std::memcpy(values[r], row, kRowBytes);
  }
  b.bank_conflicts += covers_all_banks(offsets) ? 0 : extra_passes(offsets, kMatrixRows, kRowBytes);
  for (int i = 0; i < kLanes; ++i) {
    const int g = i / 4, c = i % 4;
    uint32_t* to = static_cast<const LdmatrixOperands*>(w.operands[i])->to + four * 4 + matrix;
    if constexpr (kTransposed) *to = values[2 * c][g] | uint32_t(values[2 * c + 1][g]) << 16;
    else std::memcpy(to, &values[g][2 * c], 4);
  }
}

template <bool kTransposed>
bool execute(Block& b, Warp& w, uint32_t, int64_t n) {
  for (int four = 0; four < n; ++four)
    for (int matrix = 0; matrix < 4; ++matrix) read_matrix<kTransposed>(b, w, four, matrix);
  return true;
}

const WarpOperation kLdmatrix{"ldmatrix", execute<false>, true}, kTransposing{"ldmatrix.trans", execute<true>, true};

}  // namespace

void ldmatrix_x4(bool transposed, uint32_t* to, const void* const* rows, int n) {
  LdmatrixOperands o{to, rows};
  meet(~0u, transposed ? kTransposing : kLdmatrix, n, &o, __builtin_return_address(0));
}

}  // namespace effops::device::simt
