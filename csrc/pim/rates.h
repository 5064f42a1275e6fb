// The fast mode: what a channel sustains, from command-level simulation of a stretch of each kind of work, so that a
// step's time is a sum over its parts. tests/pim hold it within 2 % of simulating every command.
#pragma once

#include <map>
#include <utility>

#include "pim/channel.h"

namespace effops::pim {

class Rates {
 public:
  explicit Rates(const Device& device);

  const Device& device() const { return device_; }

  // Nanoseconds in which all channels together move `bytes` over the external path.
  double read_ns(double bytes) const { return bytes * read_; }
  double write_ns(double bytes) const { return bytes * write_; }
  // The same over the near path; beside ordinary accesses `units_stretch` times that.
  double near_ns(double bytes) const { return bytes * near_; }

  // Cycles of one channel's units, refresh included: a vector into the buffer; a row of every bank times it.
  double gwrite_cycles() const { return gwrite_; }
  double tile_cycles(int64_t sums, int64_t comps_per_sum) const;
  // What each side takes longer while both are at work: ordinary accesses, and units with two row buffers or a near
  // processor with several bundles.
  double units_stretch() const { return units_stretch_; }
  double transfer_stretch() const { return transfer_stretch_; }

  // Without refresh, which takes power all the time.
  double read_pj(double bytes) const { return bytes * read_pj_; }
  double write_pj(double bytes) const { return bytes * write_pj_; }
  double near_pj(double bytes) const { return bytes * near_pj_; }
  double gwrite_pj() const { return gwrite_pj_; }
  double tile_pj(int64_t sums, int64_t comps_per_sum) const;

 private:
  struct Tile {
    double cycles, pj;
  };
  const Tile& tile(int64_t sums, int64_t comps_per_sum) const;
  double per_byte(const ChannelWork& work, double bytes, double* pj) const;
  void measure_units();
  void measure_overlap(ChannelWork work);

  Device device_;
  double read_ = 0, write_ = 0, near_ = 0, gwrite_ = 0, refresh_stretch_ = 1;
  double units_stretch_ = 1, transfer_stretch_ = 1;
  double read_pj_ = 0, write_pj_ = 0, near_pj_ = 0, gwrite_pj_ = 0;
  mutable std::map<std::pair<int64_t, int64_t>, Tile> tiles_;
};

// The work of one decoded token's attention in one channel (NeuPIMs, section 6.3): keys with a token a bank, values
// with an element a bank and 512 positions (a row of them) along a row.
struct AttentionShape {
  int64_t kv_heads = 0, head_dim = 0, group = 1;  // query heads that share a KV head
  int64_t value_bytes = 2;
};
void add_logits(const Device& device, const AttentionShape& shape, int64_t len, std::vector<GemvStep>* steps);
void add_context(const Device& device, const AttentionShape& shape, int64_t len, std::vector<GemvStep>* steps);
// A matrix of `out` rows and `in` columns in one channel, a row a bank.
void add_gemv(const Device& device, int64_t out, int64_t in, int64_t value_bytes, std::vector<GemvStep>* steps);

struct GemvCost {
  double cycles = 0, pj = 0;
  int64_t comps = 0;
};
GemvCost cost_of(const Rates& rates, const std::vector<GemvStep>& steps);

}  // namespace effops::pim
