// Bounds of pages without torch, in memory of exactly their size: the pages of a naive search, and nothing written
// beyond.
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
  int64_t tokens, page, dim, rows, count;
};

char* bytes(std::vector<float>& x) { return reinterpret_cast<char*>(x.data()); }

// Small integers: scores are exact in any order, and many are equal.
std::vector<float> integers(int64_t count, std::mt19937& random) {
  std::vector<float> x(count);
  for (float& value : x) value = static_cast<float>(static_cast<int>(random() % 7) - 3);
  return x;
}

void search(const Case& c, std::mt19937& random) {
  const int64_t pages = (c.tokens + c.page - 1) / c.page;
  std::vector<float> keys = integers(c.tokens * c.dim, random), q = integers(c.rows * c.dim, random);
  std::vector<float> low(pages * c.dim), high(pages * c.dim);
  std::vector<int32_t> slots(c.tokens), indices(c.count * c.page + 1, -7);
  std::iota(slots.begin(), slots.end(), 0);
  PageAppendProblem a;
  a.batch = a.heads = 1;
  a.tokens = c.tokens;
  a.dim = c.dim;
  a.pages = pages;
  a.page = c.page;
  a.keys = {bytes(keys), 0, c.dim, 0, 1};
  a.low = {bytes(low), 0, c.dim, 0, 1};
  a.high = {bytes(high), 0, c.dim, 0, 1};
  a.slots = {slots.data(), 0, 1};
  kernels_under_test().page_append(a, std_threads(3));

  PageSearchProblem p;
  const auto length = static_cast<int32_t>(c.tokens);
  p.batch = p.kv_heads = 1;
  p.heads = c.rows;
  p.dim = c.dim;
  p.pages = pages;
  p.page = c.page;
  p.q = {bytes(q), 0, 0, c.dim, 1};
  p.low = a.low;
  p.high = a.high;
  p.kv_lens = &length;
  p.count = c.count;
  p.indices = indices.data();
  kernels_under_test().page_search(p, std_threads(3));

  std::vector<float> bounds(pages, -1e9f);
  for (int64_t j = 0; j < pages; ++j)
    for (int64_t r = 0; r < c.rows; ++r) {
      float sum = 0;
      for (int64_t i = 0; i < c.dim; ++i) {
        float most = -1e9f;
        const float x = q[r * c.dim + i];
        const auto column = [&](int64_t token) { return keys[token * c.dim + i]; };
        float least_key = column(j * c.page), most_key = least_key;
        for (int64_t t = j * c.page; t < std::min(c.tokens, (j + 1) * c.page); ++t) {
          least_key = std::min(least_key, column(t));
          most_key = std::max(most_key, column(t));
        }
        most = std::max(x * least_key, x * most_key);
        sum += most;
      }
      bounds[j] = std::max(bounds[j], sum);
    }
  std::vector<int64_t> order(pages);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t x, int64_t y) { return bounds[x] > bounds[y]; });
  order.resize(std::min(c.count, pages));
  std::sort(order.begin(), order.end());
  std::vector<int32_t> expected;
  for (const int64_t j : order)
    for (int64_t t = j * c.page; t < std::min(c.tokens, (j + 1) * c.page); ++t)
      expected.push_back(static_cast<int32_t>(t));
  expected.resize(c.count * c.page, -1);
  expected.push_back(-7);
  CHECK(indices == expected, c.tokens, " tokens in pages of ", c.page, ", D ", c.dim, ", ", c.rows, " rows, ", c.count,
        " taken");
}

TEST(page_bounds_select_the_largest) {
  std::mt19937 random(1);
  for (const int64_t tokens : {1, 15, 33, 700, 2500})
    for (const int64_t page : {1, 3, 16})
      for (const int64_t dim : {1, 31, 32, 100})
        for (const int64_t rows : {1, 3})
          for (const int64_t count : {int64_t{1}, tokens / page / 8 + 1, tokens / page, tokens / page + 3})
            if (count > 0) search({tokens, page, dim, rows, count}, random);
}

}  // namespace
}  // namespace effops::test
