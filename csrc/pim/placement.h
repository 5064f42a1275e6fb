// Who computes what and where, as the papers decide it: NeuPIMs algorithms 1 to 3, Duplex's split of experts.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "pim/rates.h"

namespace effops::pim {

// NeuPIMs algorithm 1: cycles of a request's attention in its channel, in whole tiles.
int64_t estimate_attention(const Device& device, const AttentionShape& shape, int64_t len);

// What requests take of channels: bytes of each, and the bytes that each channel still has.
struct Room {
  std::vector<double> bytes, free;
};

// Algorithm 2: requests from the longest on, each to the least loaded channel (ties: the lowest) that has room for it;
// -1: none has. `loads` holds what channels have already and is added to, as `room` is taken from; null: no limit.
std::vector<int64_t> pack_min_load(const std::vector<int64_t>& costs, std::vector<int64_t>* loads,
                                   Room* room = nullptr);
// By turns, past channels without room.
std::vector<int64_t> pack_round_robin(int64_t requests, int64_t channels, int64_t first, Room* room = nullptr);

// Algorithm 3: 0 or 1 for every request; each channel's requests halved in their order, odd ones by turns.
std::vector<int64_t> halve_batch(const std::vector<int64_t>& channel, int64_t channels);
// 0 for the longer half of all requests.
std::vector<int64_t> halve_by_length(const std::vector<int64_t>& lengths);

// When two sides are done that are at work at once, each by its factor slower while the other is.
std::pair<double, double> side_by_side(double a_ns, double a_stretch, double b_ns, double b_stretch);

// Duplex: of experts (or sections of them) in order of their tokens the first go to the near processor. The prefix
// whose slower side is soonest done; its time, and which expert is near. Beside each other the processor takes longer
// by a factor, the near one as `near_beside_ns` has it (empty: as alone).
struct ExpertSplit {
  double ns = 0, processor_ns = 0, near_ns = 0;
  std::vector<bool> near;
};
ExpertSplit split_experts(const std::vector<int64_t>& tokens, const std::vector<double>& processor_ns,
                          const std::vector<double>& near_ns, int64_t sections,
                          const std::vector<double>& near_beside_ns = {}, double processor_stretch = 1);

}  // namespace effops::pim
