#include "primitives/ldmatrix.h"

#include "run.h"

namespace effops::test {
namespace {

using namespace device;

// Eight matrices whose elements are their own numbers, rows 32 bytes apart; register by register against the layout.
template <bool kTransposed>
void check_layout() {
  constexpr int kFours = 2, kRows = kFours * 32;
  Global<uint32_t> out(kFours * 4 * 32);
  uint32_t* at = out.get();
  run({1, 32, kRows * 32}, [=] {
    uint16_t* tile = reinterpret_cast<uint16_t*>(shared_memory());
    for (int row = lane_index(); row < kRows; row += 32)
      for (int c = 0; c < 8; ++c) tile[row * 16 + c] = uint16_t(row * 8 + c);
    __syncwarp();
    const void* rows[kFours];
    for (int n = 0; n < kFours; ++n) rows[n] = tile + (n * 32 + lane_index()) * 16;
    uint32_t to[kFours][4];
    ldmatrix_x4<kTransposed>(to, rows);
    for (int n = 0; n < kFours; ++n)
      for (int i = 0; i < 4; ++i) at[(n * 4 + i) * 32 + lane_index()] = to[n][i];
  });
  for (int matrix = 0; matrix < kFours * 4; ++matrix)
    for (int lane = 0; lane < 32; ++lane) {
      const int g = lane / 4, c = lane % 4;
      const auto number = [&](int row, int column) { return uint32_t((matrix * 8 + row) * 8 + column); };
      const uint32_t expected =
          kTransposed ? number(2 * c, g) | number(2 * c + 1, g) << 16 : number(g, 2 * c) | number(g, 2 * c + 1) << 16;
      CHECK(out[matrix * 32 + lane] == expected, matrix, " ", lane);
    }
}

TEST(ldmatrix_layout) { check_layout<false>(); }
TEST(ldmatrix_layout_transposed) { check_layout<true>(); }

// Conflicts a launch counts when all rows of one four lie `stride` bytes apart.
int64_t conflicts(int stride) {
  run({1, 32, 32 * 128}, [=] {
    for (int i = lane_index() * 4; i < 32 * 128; i += 128) *reinterpret_cast<uint32_t*>(shared_memory() + i) = 0;
    __syncwarp();
    const void* rows[1] = {shared_memory() + lane_index() * stride};
    uint32_t to[1][4];
    ldmatrix_x4(to, rows);
  });
  return simt::last_bank_conflicts();
}

TEST(ldmatrix_bank_conflicts) {
  CHECK(conflicts(16) == 0, conflicts(16));
  CHECK(conflicts(32) == 4 * 1, conflicts(32));
  CHECK(conflicts(64) == 4 * 3, conflicts(64));
  CHECK(conflicts(128) == 4 * 7, conflicts(128));
  CHECK(conflicts(0) == 0, "one row for all: ", conflicts(0));
}

}  // namespace
}  // namespace effops::test
