#include "primitives/copy_async.h"

#include <cstring>

#include "primitives/vector.h"
#include "run.h"

namespace effops::test {
namespace {

using namespace device;

// Heap memory of exactly `bytes`, 16-byte aligned.
TEST(copy_async_fills_up_with_zeros) {
  for (int bytes = 0; bytes <= 16; ++bytes) {
    Global<char> from(std::max(bytes, 1)), to(64);
    for (int i = 0; i < bytes; ++i) from[i] = char(i + 1);
    const char* source = bytes ? from.get() : nullptr;
    char* result = to.get();
    run({1, 32, 64}, [=] {
      if (lane_index() != 3) return;
      store16(shared_memory(), {{1, 2, 3, 4}});
      store16(shared_memory() + 32, {{5, 6, 7, 8}});
      copy_async(shared_memory() + 16, source, bytes);
      copy_commit();
      copy_wait<0>();
      for (int i = 0; i < 48; i += 16) store16(result + i, load16(shared_memory() + i));
    });
    const uint32_t before[] = {1, 2, 3, 4}, after[] = {5, 6, 7, 8};
    CHECK(!std::memcmp(result, before, 16) && !std::memcmp(result + 32, after, 16), "neighbours, ", bytes);
    for (int i = 0; i < 16; ++i) CHECK(result[16 + i] == (i < bytes ? i + 1 : 0), bytes, " ", i);
  }
}

// What is copied is the source as it was at the issue, and groups land in their order.
TEST(copy_async_groups) {
  Global<uint32_t> from(4 * 8), to(8);
  uint32_t *source = from.get(), *result = to.get();
  for (int i = 0; i < 8; ++i) from[4 * i] = i + 1;
  run({1, 1, 128}, [=] {
    const uint32_t* word = reinterpret_cast<const uint32_t*>(shared_memory());
    for (int i = 0; i < 8; ++i) {
      copy_async(shared_memory() + 16 * i, source + 4 * i, 16);
      if (i % 2) copy_commit();
    }
    source[4 * 7] = 99;
    copy_wait<2>();
    for (int i = 0; i < 4; ++i) result[i] = word[4 * i];
    copy_wait<0>();
    for (int i = 4; i < 8; ++i) result[i] = word[4 * i];
  });
  for (int i = 0; i < 8; ++i) CHECK(to[i] == uint32_t(i + 1), i, ": ", to[i]);
}

}  // namespace
}  // namespace effops::test
