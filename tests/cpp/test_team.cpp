// Teams: every task of every loop once, whoever comes; errors; loops without the others.
#include <stdexcept>
#include <string>

#include "check.h"
#include "common/team.h"
#include "threads.h"

namespace effops::test {
namespace {

TEST(team_runs_every_task_of_every_loop_once) {
  for (int threads : {1, 2, 4, 20})
    with_team(std_threads(threads), [&](const Parallel& team) {
      CHECK(team.threads == threads, team.threads);
      for (int64_t loop = 0; loop < 300; ++loop) {
        std::vector<int> runs(loop % 13);  // a task run twice at once is a race as well
        team.for_each(loop % 13, loop % 3 > 0, [&](int64_t i) { ++runs[i]; });
        for (int64_t i = 0; i < loop % 13; ++i) CHECK(runs[i] == 1, runs[i], " times: task ", i, " of loop ", loop);
      }
    });
}

// The leader goes on at once: what a worker still does must be over before the next loop's data replace this one's.
TEST(team_publishes_what_tasks_wrote) {
  with_team(std_threads(3), [&](const Parallel& team) {
    for (int64_t loop = 0; loop < 200; ++loop) {
      std::vector<int64_t> values(64);
      team.for_each(64, true, [&](int64_t i) {
        if (i % 16 == 0) std::this_thread::yield();
        values[i] = loop + i;
      });
      int64_t sum = 0;
      for (int64_t v : values) sum += v;
      CHECK(sum == 64 * loop + 2016, sum);
    }
  });
}

// Threads that run one after the other, as a pool does inside of a region of its own.
TEST(team_needs_nobody_else) {
  const Parallel in_turn{4, [](int count, Parallel::Body body, void* context) {
                           for (int t = 0; t < count; ++t) body(context, t);
                         }};
  int sum = 0;
  with_team(in_turn, [&](const Parallel& team) { team.for_each(50, true, [&](int64_t i) { sum += int(i); }); });
  CHECK(sum == 1225, sum);
}

TEST(team_keeps_the_text_of_an_error) {
  for (int threads : {1, 3})
    for (bool in_a_task : {false, true}) {
      std::string text;
      try {
        with_team(std_threads(threads), [&](const Parallel& team) {
          team.for_each(50, true, [&](int64_t i) {
            if (in_a_task && i == 31) throw std::runtime_error("failed");
          });
          throw std::runtime_error("failed");
        });
      } catch (const std::runtime_error& e) {
        text = e.what();
      }
      CHECK(text == "failed", "'", text, "'");
    }
}

TEST(team_inside_a_team) {
  int sum = 0;
  with_team(std_threads(2), [&](const Parallel& outer) {
    with_team(std_threads(2),
              [&](const Parallel& inner) { inner.for_each(9, false, [&](int64_t i) { sum += int(i); }); });
    std::vector<int> runs(9);
    outer.for_each(9, true, [&](int64_t i) { ++runs[i]; });
    for (int n : runs) sum += n;
  });
  CHECK(sum == 45, sum);
}

}  // namespace
}  // namespace effops::test
