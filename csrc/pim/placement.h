// Who computes what and where, as the papers decide it: NeuPIMs algorithms 1 to 3, Duplex's split of experts.
#pragma once

#include <cstdint>
#include <vector>

#include "pim/rates.h"

namespace effops::pim {

// NeuPIMs algorithm 1: cycles of a request's attention in its channel, in whole tiles.
struct Estimate {
  int64_t gwrite_cycles = 100, tile_cycles = 184;  // of the authors' own estimator
};
int64_t estimate_attention(const Device& device, const AttentionShape& shape, int64_t len, const Estimate& estimate);

// Algorithm 2: requests from the longest on, each to the least loaded channel (ties: the lowest). `loads` holds what
// channels have already and is added to.
std::vector<int64_t> pack_min_load(const std::vector<int64_t>& costs, std::vector<int64_t>* loads);
std::vector<int64_t> pack_round_robin(int64_t requests, int64_t channels, int64_t first);

// Algorithm 3: 0 or 1 for every request; each channel's requests halved in their order, odd ones by turns.
std::vector<int64_t> halve_batch(const std::vector<int64_t>& channel, int64_t channels);

// Duplex: of experts (or sections of them) in order of their tokens the first go to the near processor. The prefix
// whose slower side is soonest done; its time, and which expert is near.
struct ExpertSplit {
  double ns = 0, processor_ns = 0, near_ns = 0;
  std::vector<bool> near;
};
ExpertSplit split_experts(const std::vector<int64_t>& tokens, const std::vector<double>& processor_ns,
                          const std::vector<double>& near_ns, int64_t sections);

}  // namespace effops::pim
