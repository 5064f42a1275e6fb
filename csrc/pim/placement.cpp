#include "pim/placement.h"

#include <algorithm>
#include <numeric>

namespace effops::pim {
namespace {

// Of the authors' estimator (github.com/casys-kaist/NeuPIMs f299af3); packing depends on their ratio alone.
constexpr int64_t kGwriteCycles = 100, kTileCycles = 184;

}  // namespace

int64_t estimate_attention(const Device& device, const AttentionShape& s, int64_t len) {
  const int64_t page = device.memory.row_bytes / s.value_bytes, banks = device.memory.banks();
  const int64_t key_rows = ceil_div(s.kv_heads * s.head_dim, page) * s.group;
  const int64_t value_rows = ceil_div(len, page) * s.kv_heads * s.group;
  return key_rows * (kGwriteCycles + ceil_div(len, banks) * kTileCycles) +
         value_rows * (kGwriteCycles + ceil_div(s.head_dim, banks) * kTileCycles);
}

std::vector<int64_t> pack_min_load(const std::vector<int64_t>& costs, std::vector<int64_t>* loads, Room* room) {
  std::vector<int64_t> order(costs.size()), channel(costs.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return costs[a] > costs[b]; });
  for (int64_t r : order) {
    int64_t least = -1;
    for (size_t c = 0; c < loads->size(); ++c)
      if ((least < 0 || (*loads)[c] < (*loads)[least]) && (!room || room->bytes[r] <= room->free[c]))
        least = static_cast<int64_t>(c);
    channel[r] = least;
    if (least < 0) continue;
    (*loads)[least] += costs[r];
    if (room) room->free[least] -= room->bytes[r];
  }
  return channel;
}

std::vector<int64_t> pack_round_robin(int64_t requests, int64_t channels, int64_t first, Room* room) {
  std::vector<int64_t> channel(requests, -1);
  int64_t turn = first;
  for (int64_t r = 0; r < requests; ++r)
    for (int64_t i = 0; i < channels && channel[r] < 0; ++i) {
      const int64_t c = (turn + i) % channels;
      if (room && room->bytes[r] > room->free[c]) continue;
      channel[r] = c;
      turn = c + 1;
      if (room) room->free[c] -= room->bytes[r];
    }
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

std::vector<int64_t> halve_by_length(const std::vector<int64_t>& lengths) {
  std::vector<int64_t> order(lengths.size()), half(lengths.size(), 1);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return lengths[a] > lengths[b]; });
  for (size_t i = 0; i < (lengths.size() + 1) / 2; ++i) half[order[i]] = 0;
  return half;
}

std::pair<double, double> side_by_side(double a_ns, double a_stretch, double b_ns, double b_stretch) {
  if (a_ns <= 0 || b_ns <= 0) return {a_ns, b_ns};
  const double both = std::min(a_ns * a_stretch, b_ns * b_stretch);  // until one is done
  return {both + a_ns - both / a_stretch, both + b_ns - both / b_stretch};
}

ExpertSplit split_experts(const std::vector<int64_t>& tokens, const std::vector<double>& processor_ns,
                          const std::vector<double>& near_ns, int64_t sections,
                          const std::vector<double>& near_beside_ns, double processor_stretch) {
  const int64_t experts = static_cast<int64_t>(tokens.size());
  const int64_t units = sections > 0 ? std::min(sections, experts) : experts;  // expert e lies in section e % units
  std::vector<int64_t> load(units), order(units);
  std::vector<double> slow(units), beside(units), fast(units);
  for (int64_t e = 0; e < experts; ++e) {
    load[e % units] += tokens[e];
    fast[e % units] += processor_ns[e];
    slow[e % units] += near_ns[e];
    beside[e % units] += near_beside_ns.empty() ? near_ns[e] : near_beside_ns[e];
  }
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return load[a] < load[b]; });
  double processor = std::accumulate(fast.begin(), fast.end(), 0.0), near = 0, near_beside = 0;
  ExpertSplit best;
  best.ns = best.processor_ns = processor;
  int64_t taken = 0;
  for (int64_t i = 0; i < units; ++i) {
    processor -= fast[order[i]];
    near += slow[order[i]];
    near_beside += beside[order[i]];
    const double rest = i + 1 == units ? 0 : processor;  // what is left of a sum of differences is not work
    const auto [a, b] = side_by_side(rest, processor_stretch, near, near > 0 ? near_beside / near : 1);
    if (std::max(a, b) < best.ns) {
      best.ns = std::max(a, b);
      best.processor_ns = std::max(a, 0.0);
      best.near_ns = b;
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
