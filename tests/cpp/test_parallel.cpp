#include "check.h"
#include "threads.h"

namespace effops::test {
namespace {

TEST(for_each_runs_every_task_once) {
  for (int threads : {1, 2, 3, 4})
    for (int64_t tasks : {0, 1, 2, 3, 7, 1000})
      for (bool worth : {false, true}) {
        std::vector<int> runs(tasks);  // a task run twice at once is a race as well
        std_threads(threads).for_each(tasks, worth, [&](int64_t i) { ++runs[i]; });
        for (int64_t i = 0; i < tasks; ++i) CHECK(runs[i] == 1, runs[i], " times: task ", i, " of ", tasks);
      }
}

// One range is slow, so that the threads that are done all help with it at once.
TEST(for_each_shares_a_slow_range) {
  for (int round = 0; round < 20; ++round) {
    std::vector<int> runs(400);
    std_threads(4).for_each(400, true, [&](int64_t i) {
      ++runs[i];
      if (i < 100) std::this_thread::yield();
    });
    for (int64_t i = 0; i < 400; ++i) CHECK(runs[i] == 1, runs[i], " times: task ", i);
  }
}

TEST(for_each_publishes_what_tasks_wrote) {
  std::vector<int64_t> values(100);
  const Parallel parallel = std_threads(4);
  parallel.for_each(100, true, [&](int64_t i) { values[i] = i; });
  int64_t sum = 0;
  for (int64_t v : values) sum += v;
  CHECK(sum == 4950, sum);
}

TEST(for_each_keeps_the_text_of_an_error) {
  for (int threads : {1, 4}) {
    std::string text;
    try {
      std_threads(threads).for_each(50, true, [](int64_t i) {
        if (i % 7 == 3) throw std::runtime_error("task failed");
      });
    } catch (const std::runtime_error& e) {
      text = e.what();
    }
    CHECK(text == "task failed", "'", text, "'");
  }
}

}  // namespace
}  // namespace effops::test
