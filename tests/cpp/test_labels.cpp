// Labels of few bits: the tokens of a naive search over scores in plain integers, and nothing written beyond.
#include <algorithm>
#include <numeric>
#include <random>
#include <vector>

#include "check.h"
#include "kernels_under_test.h"
#include "threads.h"

namespace effops::test {
namespace {

struct Case {
  int bits;
  int64_t tokens, channels, rows, count;
  bool planes;  // memory [words, tokens], otherwise [tokens, words]
};

int32_t label_of(const std::vector<int32_t>& words, const LabelFormat& f, int64_t at, int64_t word_step, int64_t c) {
  const int64_t a_word = 32 / f.bits;
  const auto word = static_cast<uint32_t>(words[at + c / a_word * word_step]);
  return static_cast<int32_t>(word >> (c % a_word * f.bits) & ((1u << f.bits) - 1)) - f.middle();
}

void search(const Case& c, int threads, std::mt19937& random) {
  LabelSearchProblem p;
  p.format = {DType::f32, c.bits, c.channels};
  const int64_t items = p.format.items();
  std::vector<int32_t> words(c.tokens * items), channels(c.channels);
  for (int32_t& word : words) word = static_cast<int32_t>(random() & random());
  std::iota(channels.begin(), channels.end(), 0);
  std::vector<float> q(c.rows * c.channels);
  for (float& x : q) x = static_cast<float>(static_cast<int>(random() % 255) - 127);
  q[0] = 127;  // the step is 1
  std::vector<int32_t> indices(c.count + 1, -7);
  p.batch = p.kv_heads = 1;
  p.heads = c.rows;
  p.capacity = c.tokens;
  p.dim = c.channels;
  p.q = {reinterpret_cast<char*>(q.data()), 0, 0, c.channels, 1};
  const int64_t token = c.planes ? 1 : items, item = c.planes ? c.tokens : 1;
  p.labels = {reinterpret_cast<char*>(words.data()), 0, token, 0, item};
  p.channels = {channels.data(), {0, 1}};
  p.count = c.count;
  p.indices = indices.data();
  kernels_under_test().label_search(p, std_threads(threads));

  std::vector<int64_t> scores(c.tokens, INT64_MIN), order(c.tokens);
  for (int64_t j = 0; j < c.tokens; ++j)
    for (int64_t r = 0; r < c.rows; ++r) {
      int64_t sum = 0;
      for (int64_t i = 0; i < c.channels; ++i)
        sum += static_cast<int64_t>(q[r * c.channels + i]) * label_of(words, p.format, j * token, item, i);
      scores[j] = std::max(scores[j], sum);
    }
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return scores[a] > scores[b]; });
  order.resize(std::min(c.count, c.tokens));
  std::sort(order.begin(), order.end());
  order.resize(c.count, -1);
  bool same = indices.back() == -7;
  for (int64_t i = 0; i < c.count; ++i) same = same && indices[i] == order[i];
  CHECK(same, c.bits, " bits, ", c.tokens, " tokens, ", c.channels, " channels, ", c.rows, " rows, ", c.count,
        " taken");
}

TEST(labels_select_the_largest_scores) {
  std::mt19937 random(1);
  for (const int bits : {4, 8})
    for (const int64_t tokens : {1, 15, 16, 31, 33, 512, 700, 2500})
      for (const int64_t channels : {1, 8, 9, 33})
        for (const int64_t rows : {1, 2, 3, 7})
          for (const int64_t count : {int64_t{1}, tokens / 16 + 1, tokens - 1, tokens + 3})
            if (count > 0) search({bits, tokens, channels, rows, count, tokens % 2 == 0}, 3, random);
}

}  // namespace
}  // namespace effops::test
