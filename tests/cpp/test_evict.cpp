// append_evicting without torch, in guarded memory: which entry goes, and nothing read or written beyond.
#include "common/evict.h"

#include <stdexcept>

#include "check.h"
#include "tensor.h"
#include "threads.h"

namespace effops::test {
namespace {

struct Cache {
  explicit Cache(int64_t slots) : k(DType::f16, {1, slots, 1, 3}, Layout::gapped), mass(DType::f32, {1, slots, 1, 1}) {
    positions.resize(slots, -1);
  }

  // Tokens whose key is their position; the position of each slot's token.
  void append(const std::vector<int32_t>& tokens, int64_t recent, int64_t num_sinks) {
    Tensor fresh(DType::f16, {1, static_cast<int64_t>(tokens.size()), 1, 3});
    for (size_t t = 0; t < tokens.size(); ++t)
      for (int64_t d = 0; d < 3; ++d) fresh.set(0, static_cast<int64_t>(t), 0, d, tokens[t]);
    fresh.freeze();
    const List<int32_t> coming(tokens);
    EvictProblem p;
    p.batch = p.heads = 1;
    p.tokens = static_cast<int64_t>(tokens.size());
    p.slots = k.size(1);
    p.k_dim = p.v_dim = 3;
    p.bytes = 2;
    p.k = p.v = fresh.view();
    p.k_cache = p.v_cache = k.view();
    p.mass = mass.rows();
    p.positions = {reinterpret_cast<char*>(positions.data()), 0, 1, 0};
    p.new_positions = {coming.get(), 0, 1};
    p.recent = recent;
    p.num_sinks = num_sinks;
    append_evicting(p, std_threads(2));
    for (int64_t j = 0; j < p.slots; ++j)
      CHECK(positions[j] < 0 || k.get(0, j, 0, 2) == positions[j], "slot ", j, " does not hold token ", positions[j]);
    CHECK(k.gaps_intact(), "written between rows");
  }

  Tensor k, mass;
  std::vector<int32_t> positions;
};

TEST(evict_the_least_mass) {
  Cache c(5);
  c.append({0, 1, 2, 3, 4}, 2, 1);
  CHECK(c.positions == std::vector<int32_t>({0, 1, 2, 3, 4}), "a plain append");
  for (int64_t j = 0; j < 5; ++j) c.mass.set(0, j, 0, 0, j == 0 ? 0 : j == 4 ? 0.25 : 3);
  c.append({5}, 2, 1);  // token 0 is a sink, token 4 recent; 1, 2 and 3 are alike
  CHECK(c.positions == std::vector<int32_t>({0, 5, 2, 3, 4}), "the oldest of equals");
  CHECK(c.mass.get(0, 1, 0, 0) == 0, "a new entry's mass");
  c.append({-1, 6}, 2, 1);
  CHECK(c.positions == std::vector<int32_t>({0, 5, 2, 3, 6}), "one token skipped");
  bool refused = false;
  try {
    c.append({7, 8}, 7, 1);
  } catch (const std::runtime_error&) {
    refused = true;
  }
  CHECK(refused && c.positions == std::vector<int32_t>({0, 5, 2, 3, 6}), "nothing may go");
}

}  // namespace
}  // namespace effops::test
