#include "pim/rates.h"

#include <algorithm>

namespace effops::pim {
namespace {

// The shared vector holds a row's worth of values.
int64_t row_values(const Device& d, int64_t value_bytes) { return d.memory.row_bytes / value_bytes; }
int64_t comp_values(const Device& d, int64_t value_bytes) { return d.pim.comp_bytes / value_bytes; }

ChannelWork transfers(int64_t accesses, bool write) {
  ChannelWork w;
  w.transfers.push_back({accesses, write});
  return w;
}

constexpr int64_t kMost = 1 << 18;  // commands of a stretch, where refreshes are rare
constexpr int64_t kRefreshes = 48;  // that a stretch of work meets, so that their share is right

}  // namespace

Rates::Rates(const Device& device) : device_(device) {
  const Memory& m = device_.memory;
  const Energy& e = device_.energy;
  if (m.flat_gb_per_s > 0) {
    read_ = write_ = 1 / m.flat_gb_per_s;
    read_pj_ = e.read / double(m.access_bytes);
    write_pj_ = e.write / double(m.access_bytes);
    return;
  }
  const int64_t accesses = std::min(kMost, kRefreshes * device_.timing.tREFI / device_.timing.burst);
  const double bytes = double(accesses) * double(m.access_bytes);
  read_ = per_byte(transfers(accesses, false), bytes, &read_pj_);
  write_ = per_byte(transfers(accesses, true), bytes, &write_pj_);
  if (device_.pim.kind == PimKind::near) {
    ChannelWork w;
    w.near_accesses = std::min(kMost, kRefreshes * device_.timing.tREFI / device_.timing.tCCD_L);
    near_ = per_byte(w, double(w.near_accesses * m.access_bytes * device_.pim.banks_per_access), &near_pj_);
    if (device_.bundles() > 1) measure_overlap(w);
  }
  if (device_.pim.kind == PimKind::banks) {
    measure_units();
    if (device_.pim.row_buffers == 2) {
      ChannelWork w;  // an ordinary mixture of vectors and rows: sequences of a few hundred keys, eight heads of 128
      for (int i = 0; i < 8; ++i) {
        add_logits(device_, {8, 128, 1, 2}, 300, &w.gemv);
        add_context(device_, {8, 128, 1, 2}, 300, &w.gemv);
      }
      measure_overlap(w);
    }
  }
}

void Rates::measure_units() {
  const int64_t comps = device_.memory.row_bytes / device_.pim.comp_bytes;
  ChannelWork w;
  w.refresh = false;
  const auto with_vector = [&](int64_t n) {
    w.gemv.clear();
    for (int64_t i = 0; i < n; ++i) {
      w.gemv.push_back({true, 0, 0});
      w.gemv.push_back({false, 1, comps});
    }
    return simulate_channel(device_, w);
  };
  const ChannelReport few = with_vector(8), many = with_vector(24);
  const Tile alone = tile(1, comps);
  // What a vector adds to the row after it: the rest hides behind opening the row.
  gwrite_ = std::max(0.0, double(many.gemv_cycles - few.gemv_cycles) / 16 - alone.cycles);
  gwrite_pj_ = (energy_pj(device_, many) - energy_pj(device_, few)) / 16 - alone.pj;

  const int64_t rows = std::min(kMost / comps, kRefreshes * device_.timing.tREFI / int64_t(alone.cycles) + 1);
  w.gemv.assign(static_cast<size_t>(rows), {false, 1, comps});
  const double without = double(simulate_channel(device_, w).gemv_cycles);
  w.refresh = true;
  refresh_stretch_ = double(simulate_channel(device_, w).gemv_cycles) / without;
  gwrite_ *= refresh_stretch_;
  tiles_.clear();
}

// The units' or the near processor's work, alone and beside reads that outlast it.
void Rates::measure_overlap(ChannelWork w) {
  const auto cycles = [](const ChannelReport& r) { return double(std::max(r.gemv_cycles, r.near_cycles)); };
  const double alone = cycles(simulate_channel(device_, w));
  double per_access = read_ * double(device_.memory.channels * device_.memory.access_bytes) * device_.memory.clock_ghz;
  const int64_t accesses = int64_t(2 * alone / per_access);
  w.transfers.push_back({accesses, false});
  if (w.near_accesses > 0) {  // reads alone keep to the same bundles, as with hardly anything beside them
    ChannelWork reads = transfers(accesses, false);
    reads.near_accesses = 1;
    per_access = double(simulate_channel(device_, reads).transfer_cycles) / double(accesses);
  }
  const ChannelReport both = simulate_channel(device_, w);
  units_stretch_ = std::max(1.0, cycles(both) / alone);
  const double after = (double(both.transfer_cycles) - cycles(both)) / per_access;  // accesses once the units rest
  transfer_stretch_ = std::max(1.0, cycles(both) / ((double(accesses) - after) * per_access));
}

double Rates::per_byte(const ChannelWork& work, double bytes, double* pj) const {
  ChannelReport r = simulate_channel(device_, work);
  const double channels = double(device_.memory.channels);
  r.counts[static_cast<int>(Op::refresh)] = 0;
  *pj = energy_pj(device_, r) / bytes;
  return double(r.cycles) / device_.memory.clock_ghz / (bytes * channels);
}

const Rates::Tile& Rates::tile(int64_t sums, int64_t comps_per_sum) const {
  auto [it, fresh] = tiles_.try_emplace({sums, comps_per_sum});
  if (fresh) {
    ChannelWork w;
    w.refresh = false;
    w.gemv.assign(4, {false, sums, comps_per_sum});
    const ChannelReport a = simulate_channel(device_, w);
    w.gemv.assign(12, {false, sums, comps_per_sum});
    const ChannelReport b = simulate_channel(device_, w);
    it->second = {double(b.gemv_cycles - a.gemv_cycles) / 8 * refresh_stretch_,
                  (energy_pj(device_, b) - energy_pj(device_, a)) / 8};
  }
  return it->second;
}

double Rates::tile_cycles(int64_t sums, int64_t comps_per_sum) const { return tile(sums, comps_per_sum).cycles; }
double Rates::tile_pj(int64_t sums, int64_t comps_per_sum) const { return tile(sums, comps_per_sum).pj; }

void add_gemv(const Device& d, int64_t out, int64_t in, int64_t value_bytes, std::vector<GemvStep>* steps) {
  const int64_t chunk = row_values(d, value_bytes), per_comp = comp_values(d, value_bytes);
  for (int64_t from = 0; from < in; from += chunk) {
    steps->push_back({true, 0, 0});
    const int64_t comps = ceil_div(std::min(chunk, in - from), per_comp);
    for (int64_t tile = 0; tile < ceil_div(out, d.memory.banks()); ++tile) steps->push_back({false, 1, comps});
  }
}

void add_logits(const Device& d, const AttentionShape& s, int64_t len, std::vector<GemvStep>* steps) {
  const int64_t chunk = row_values(d, s.value_bytes), per_comp = comp_values(d, s.value_bytes);
  const int64_t heads_per_row = std::max<int64_t>(1, chunk / s.head_dim);
  const int64_t tiles = ceil_div(len, d.memory.banks());
  for (int64_t g = 0; g < s.group; ++g)
    for (int64_t h = 0; h < s.kv_heads; h += heads_per_row) {
      const int64_t heads = std::min(heads_per_row, s.kv_heads - h);
      for (int64_t part = 0; part < s.head_dim; part += chunk) {
        steps->push_back({true, 0, 0});
        const int64_t comps = ceil_div(std::min(chunk, s.head_dim - part), per_comp);
        for (int64_t tile = 0; tile < tiles; ++tile) steps->push_back({false, heads, comps});
      }
    }
}

void add_context(const Device& d, const AttentionShape& s, int64_t len, std::vector<GemvStep>* steps) {
  const int64_t chunk = row_values(d, s.value_bytes), per_comp = comp_values(d, s.value_bytes);
  const int64_t tiles = ceil_div(s.head_dim, d.memory.banks());
  for (int64_t h = 0; h < s.kv_heads * s.group; ++h)
    for (int64_t from = 0; from < len; from += chunk) {
      steps->push_back({true, 0, 0});
      const int64_t comps = ceil_div(std::min(chunk, len - from), per_comp);
      for (int64_t tile = 0; tile < tiles; ++tile) steps->push_back({false, 1, comps});
    }
}

GemvCost cost_of(const Rates& rates, const std::vector<GemvStep>& steps) {
  GemvCost c;
  for (const GemvStep& s : steps) {
    if (s.gwrite) {
      c.cycles += rates.gwrite_cycles();
      c.pj += rates.gwrite_pj();
    } else if (s.sums > 0) {
      c.cycles += rates.tile_cycles(s.sums, s.comps_per_sum);
      c.comps += s.sums * s.comps_per_sum;
      c.pj += rates.tile_pj(s.sums, s.comps_per_sum);
    }
  }
  return c;
}

}  // namespace effops::pim
