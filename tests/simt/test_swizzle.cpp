#include "primitives/swizzle.h"

#include "primitives/ldmatrix.h"
#include "run.h"

namespace effops::test {
namespace {

using namespace device;

constexpr int kRows = 64;

// Every four of matrices that an mma loop reads: 16 rows and two chunks, from each first row and chunk.
template <int kChunks>
void check() {
  using Place = Swizzle<kChunks>;
  std::vector<bool> used(kRows * kChunks);
  for (int row = 0; row < kRows; ++row)
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      const int at = Place::offset(row, chunk) / 16;
      CHECK(at >= row * kChunks && at < (row + 1) * kChunks && !used[at], kChunks, ": ", row, " ", chunk);
      used[at] = true;
    }
  run({1, 32, kRows * Place::kRowBytes}, [] {
    char* tile = shared_memory();
    for (int i = lane_index(); i < kRows * Place::kRowBytes / 4; i += 32) reinterpret_cast<uint32_t*>(tile)[i] = 0;
    __syncwarp();
    for (int row = 0; row < kRows; row += 16)
      for (int chunk = 0; chunk + 1 < kChunks; ++chunk) {
        const void* rows[1] = {tile + Place::offset(row + lane_index() % 16, chunk + lane_index() / 16)};
        uint32_t to[1][4];
        ldmatrix_x4(to, rows);
      }
  });
  CHECK(simt::last_bank_conflicts() == 0, kChunks, " chunks: ", simt::last_bank_conflicts());
}

// Eight lanes of a row-wise copy write eight successive chunks of one row, or of two where it ends.
template <int kChunks>
void check_copies() {
  if constexpr (kChunks % 8 != 0) return;
  for (int row = 0; row < kRows; ++row)
    for (int first = 0; first < kChunks; first += 8) {
      unsigned banks = 0;
      for (int i = 0; i < 8; ++i) banks |= 1u << (Swizzle<kChunks>::offset(row, first + i) / 16 % 8);
      CHECK(banks == 0xff, kChunks, ": ", row, " ", first);
    }
}

template <int... kHalf>
void check_all(std::integer_sequence<int, kHalf...>) {
  (check<2 * kHalf + 4>(), ...);
  (check_copies<2 * kHalf + 4>(), ...);
}

TEST(swizzle_without_conflicts) { check_all(std::make_integer_sequence<int, 15>()); }

// A tile that is written at `write` and read at `read`, by ldmatrix: whether its numbers come back.
template <class Write, class Read>
bool comes_back(Write write, Read read) {
  constexpr int kTile = 16, kChunks = 8;
  Global<uint32_t> out(4 * 32);
  uint32_t* at = out.get();
  run({1, 32, kTile * kChunks * 16}, [=] {
    for (int i = lane_index(); i < kTile * kChunks; i += 32) {
      uint16_t* to = reinterpret_cast<uint16_t*>(shared_memory() + write(i / kChunks, i % kChunks));
      for (int j = 0; j < 8; ++j) to[j] = uint16_t(i * 8 + j);
    }
    __syncwarp();
    const void* rows[1] = {shared_memory() + read(lane_index() % 16, 2 + lane_index() / 16)};
    uint32_t to[1][4];
    ldmatrix_x4(to, rows);
    for (int i = 0; i < 4; ++i) at[i * 32 + lane_index()] = to[0][i];
  });
  for (int i = 0; i < 4; ++i)
    for (int lane = 0; lane < 32; ++lane) {
      const int row = lane / 4 + i % 2 * 8, element = (2 + i / 2) * 8 + lane % 4 * 2;
      if ((out[i * 32 + lane] & 0xffff) != uint32_t(row * kChunks * 8 + element)) return false;
    }
  return true;
}

// Reads by another swizzle give wrong numbers; none on both sides gives the right ones, slowly.
TEST(swizzle_planted_bugs) {
  const auto swizzled = [](int row, int chunk) { return Swizzle<8>::offset(row, chunk); };
  const auto plain = [](int row, int chunk) { return row * 128 + chunk * 16; };
  CHECK(comes_back(swizzled, swizzled) && simt::last_bank_conflicts() == 0, simt::last_bank_conflicts());
  CHECK(!comes_back(swizzled, plain), "one side only");
  CHECK(!comes_back(plain, swizzled), "the other side only");
  CHECK(comes_back(plain, plain) && simt::last_bank_conflicts() == 4 * 7, simt::last_bank_conflicts());
}

}  // namespace
}  // namespace effops::test
