// Conflicts of plain accesses, for strides of which they are known.
#include "planted.h"
#include "primitives/copy_async.h"
#include "primitives/swizzle.h"
#include "primitives/vector.h"

namespace effops::test {
namespace {

using namespace device;

template <class Body>
int64_t conflicts(int threads, const Body& body) {
  setenv("EFFOPS_SIMT_BANKS", "1", 1);
  run({1, threads, 32768}, body);
  unsetenv("EFFOPS_SIMT_BANKS");
  return simt::last_bank_conflicts();
}

// Stores of one float a lane, `stride` floats apart, by two warps.
int64_t strided(int stride, int rounds) {
  return conflicts(64, [=] {
    constexpr int kRoom = 33 * 32;
    float* x = reinterpret_cast<float*>(shared_memory()) + warp_index() * rounds * kRoom + lane_index() * stride;
    for (int i = 0; i < rounds; ++i) x[i * kRoom] = 1;
  });
}

TEST(bank_conflicts_of_strides) {
  in_several_orders([](const char*) {
    for (int stride : {1, 3, 5, 31, 33}) CHECK(strided(stride, 3) == 0, stride, ": ", strided(stride, 3));
    for (int stride : {2, 4, 8, 16, 32}) CHECK(strided(stride, 3) == 2 * 3 * (stride - 1), stride);
  });
}

TEST(bank_conflicts_of_vectors) {
  const auto stores = [](int stride) {
    return conflicts(32, [=] { store16(shared_memory() + stride * lane_index(), {}); });
  };
  CHECK(stores(16) == 0, stores(16));
  CHECK(stores(32) == 4 * 1, stores(32));
  CHECK(stores(128) == 4 * 7, stores(128));
}

// One word for all is no conflict.
TEST(bank_conflicts_of_a_broadcast) {
  const int64_t found = conflicts(32, [] {
    float* x = reinterpret_cast<float*>(shared_memory());
    x[lane_index()] = 1;
    __syncwarp();
    for (int i = 0; i < 8; ++i) use(x[i]);
  });
  CHECK(found == 0, found);
}

// A tile of 16-byte chunks that copies fill row by row, and its columns, swizzled and plain.
TEST(bank_conflicts_of_a_tile) {
  Global<Vector16> from(1);
  const Vector16* source = from.get();
  const auto tile = [=](bool swizzled, bool columns) {
    return conflicts(64, [=] {
      for (int i = threadIdx.x; i < 64 * 8; i += 64) {
        const int row = columns ? i % 64 : i / 8, chunk = columns ? i / 64 : i % 8;
        copy_async(shared_memory() + (swizzled ? Swizzle<8>::offset(row, chunk) : row * 128 + chunk * 16), source, 16);
      }
      copy_commit();
      copy_wait<0>();
    });
  };
  CHECK(tile(false, false) == 0 && tile(true, false) == 0 && tile(true, true) == 0, "rows, or swizzled");
  CHECK(tile(false, true) == 64 * 7, tile(false, true));
}

}  // namespace
}  // namespace effops::test
