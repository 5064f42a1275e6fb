#include <cstring>
#include <thread>

#include "check.h"
#include "common/scratch.h"

namespace effops::test {
namespace {

TEST(scratch_is_aligned_and_grows) {
  for (size_t bytes : {1, 100, 5000, 10, 100000}) {
    void* block = thread_scratch(Scratch::task, bytes);
    CHECK(reinterpret_cast<uintptr_t>(block) % 64 == 0, block);
    std::memset(block, 1, bytes);
  }
}

TEST(scratch_blocks_are_apart) {
  char* task = static_cast<char*>(thread_scratch(Scratch::task, 4096));
  char* call = static_cast<char*>(thread_scratch(Scratch::call, 4096));
  std::memset(task, 1, 4096);
  std::memset(call, 2, 4096);
  std::thread([] { std::memset(thread_scratch(Scratch::call, 4096), 3, 4096); }).join();
  for (int i = 0; i < 4096; ++i) CHECK(task[i] == 1 && call[i] == 2, "at byte ", i);
}

TEST(carver_keeps_alignment) {
  Carver measure;
  measure.take<char>(1);
  measure.take<double>(9);
  measure.take<float>(0);
  CHECK(measure.used() == 64 + 128, measure.used());
  char* base = static_cast<char*>(thread_scratch(Scratch::task, measure.used()));
  Carver carver(base);
  CHECK(carver.take<char>(1) == base, "first");
  CHECK(reinterpret_cast<char*>(carver.take<double>(9)) == base + 64, "second");
}

}  // namespace
}  // namespace effops::test
