#include "pim/placement.h"

#include <algorithm>
#include <numeric>

namespace effops::pim {

int64_t estimate_attention(const Device& device, const AttentionShape& s, int64_t len, const Estimate& e) {
  const int64_t page = device.memory.row_bytes / s.value_bytes, banks = device.memory.banks();
  const int64_t key_rows = ceil_div(s.kv_heads * s.head_dim, page) * s.group;
  const int64_t value_rows = ceil_div(len, page) * s.kv_heads * s.group;
  return key_rows * (e.gwrite_cycles + ceil_div(len, banks) * e.tile_cycles) +
         value_rows * (e.gwrite_cycles + ceil_div(s.head_dim, banks) * e.tile_cycles);
}

std::vector<int64_t> pack_min_load(const std::vector<int64_t>& costs, std::vector<int64_t>* loads) {
  std::vector<int64_t> order(costs.size()), channel(costs.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return costs[a] > costs[b]; });
  for (int64_t r : order) {
    const auto least = std::min_element(loads->begin(), loads->end());
    channel[r] = least - loads->begin();
    *least += costs[r];
  }
  return channel;
}

std::vector<int64_t> pack_round_robin(int64_t requests, int64_t channels, int64_t first) {
  std::vector<int64_t> channel(requests);
  for (int64_t r = 0; r < requests; ++r) channel[r] = (first + r) % channels;
  return channel;
}

std::vector<int64_t> halve_batch(const std::vector<int64_t>& channel, int64_t channels) {
  std::vector<int64_t> size(channels), seen(channels), half(channel.size());
  for (int64_t c : channel) ++size[c];
  bool up = true;
  for (int64_t c = 0; c < channels; ++c) {
    const bool odd = size[c] % 2 != 0;
    size[c] = size[c] / 2 + (odd && up ? 1 : 0);
    if (odd) up = !up;
  }
  for (size_t r = 0; r < channel.size(); ++r) half[r] = seen[channel[r]]++ < size[channel[r]] ? 0 : 1;
  return half;
}

ExpertSplit split_experts(const std::vector<int64_t>& tokens, const std::vector<double>& processor_ns,
                          const std::vector<double>& near_ns, int64_t sections) {
  const int64_t experts = static_cast<int64_t>(tokens.size());
  const int64_t units = sections > 0 ? std::min(sections, experts) : experts;  // expert e lies in section e % units
  std::vector<int64_t> load(units), order(units);
  std::vector<double> slow(units), fast(units);
  for (int64_t e = 0; e < experts; ++e) {
    load[e % units] += tokens[e];
    fast[e % units] += processor_ns[e];
    slow[e % units] += near_ns[e];
  }
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return load[a] < load[b]; });
  double processor = std::accumulate(fast.begin(), fast.end(), 0.0), near = 0;
  ExpertSplit best;
  best.ns = best.processor_ns = processor;
  int64_t taken = 0;
  for (int64_t i = 0; i < units; ++i) {
    processor -= fast[order[i]];
    near += slow[order[i]];
    if (std::max(processor, near) < best.ns) {
      best.ns = std::max(processor, near);
      best.processor_ns = std::max(processor, 0.0);
      best.near_ns = near;
      taken = i + 1;
    }
  }
  std::vector<bool> unit_near(units);
  for (int64_t i = 0; i < taken; ++i) unit_near[order[i]] = true;
  best.near.resize(experts);
  for (int64_t e = 0; e < experts; ++e) best.near[e] = unit_near[e % units];
  return best;
}

}  // namespace effops::pim
