// The running softmax against sums in double, tile by tile, and its rows without keys.
#include "primitives/softmax.h"

#include <random>

#include "run.h"

namespace effops::test {
namespace {

using device::RowSoftmax;

// Scores of several tiles, some hidden (-inf), drawn around a level that rises or falls.
void check_rows(unsigned seed) {
  std::mt19937 draw(seed);
  std::normal_distribution<float> normal(0, 3);
  RowSoftmax row;
  double exact = 0, weighed_exact = 0;  // relative to 2^0
  float weighed = 0;
  for (int tile = 0; tile < 6; ++tile) {
    float scores[8], top = -INFINITY;
    for (float& x : scores) {
      x = draw() % 4 == 0 ? -INFINITY : normal(draw) + float(tile) * (seed % 2 ? 7.0f : -7.0f);
      top = top > x ? top : x;
    }
    weighed *= row.rescale(top);
    for (int i = 0; i < 8; ++i) {
      const float weight = row.weight(scores[i]);
      row.sum += weight;
      weighed += weight * float(i);
      exact += std::exp2(double(scores[i]));
      weighed_exact += std::exp2(double(scores[i])) * i;
    }
  }
  if (exact == 0) return;
  CHECK(std::abs(row.lse2() - std::log2(exact)) <= 1e-5 * (1 + std::abs(std::log2(exact))), row.lse2(), " ", exact);
  CHECK(std::abs(weighed / row.sum - weighed_exact / exact) <= 1e-5 * weighed_exact / exact, seed);
}

TEST(softmax_of_rows) {
  for (unsigned seed = 0; seed < 2000; ++seed) check_rows(seed);
}

TEST(softmax_at_the_edges) {
  RowSoftmax none;
  CHECK(none.rescale(-INFINITY) == 0 && none.sum == 0 && none.weight(-INFINITY) == 0, "no keys");
  CHECK(none.lse2() == -INFINITY, none.lse2());
  RowSoftmax one;
  one.rescale(1e30f);
  one.sum += one.weight(1e30f);
  CHECK(one.sum == 1 && one.lse2() == 1e30f, "one huge score");
  CHECK(one.rescale(-INFINITY) == 1 && one.weight(-1e30f) == 0, "a tile that is hidden changes nothing");
  RowSoftmax nan;
  nan.rescale(2);
  nan.sum += nan.weight(NAN);
  CHECK(std::isnan(nan.lse2()), "NaN arrives");
}

}  // namespace
}  // namespace effops::test
