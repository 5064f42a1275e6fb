// The channel simulator under the sanitizers: drawn work on drawn devices, counts and bounds.
#include <random>

#include "check.h"
#include "pim/serve.h"

namespace effops::test {
namespace {

using namespace effops::pim;

Device device_of(PimKind kind, int row_buffers) {
  Device d;
  d.memory = {1.0, 4, 2, 4, 4, 64, 1024, 64, 1, 0, 0};
  d.timing = {14, 14, 34, 14, 4, 2, 1, 2, 4, 6, 30, 16, 6, 8, 6, 2, 3900, 260};
  d.pim.kind = kind;
  d.pim.row_buffers = row_buffers;
  d.pim.comp_bytes = 32, d.pim.comp_interval = 2, d.pim.least_comps = 6, d.pim.banks_per_activation = 4;
  d.pim.gwrite_cycles = 96, d.pim.result_bytes = 2, d.pim.composite = row_buffers == 2;
  d.pim.banks_per_access = 8, d.pim.activations_per_access = 8, d.pim.peak_tflops = 10;
  d.processor.peak_tflops = 100;
  return d;
}

TEST(pim_channel_does_what_is_asked) {
  std::mt19937 random(7);
  const auto below = [&](int64_t n) { return static_cast<int64_t>(random() % static_cast<uint64_t>(n)); };
  for (int i = 0; i < 60; ++i) {
    const PimKind kind = static_cast<PimKind>(below(3));
    const Device d = device_of(kind, 1 + static_cast<int>(below(2)));
    ChannelWork w;
    int64_t reads = 0, writes = 0, comps = 0;
    for (int64_t n = below(5); n > 0; --n) {
      w.transfers.push_back({below(400), below(2) == 0});
      (w.transfers.back().write ? writes : reads) += w.transfers.back().accesses;
    }
    if (kind == PimKind::banks)
      for (int64_t n = below(30); n > 0; --n) {
        w.gemv.push_back({below(4) == 0, below(5), 1 + below(32)});
        if (!w.gemv.back().gwrite) comps += w.gemv.back().sums * w.gemv.back().comps_per_sum;
      }
    if (kind == PimKind::near) w.near_accesses = below(500);
    std::vector<Command> trace;
    const ChannelReport r = simulate_channel(d, w, &trace);
    const auto count = [&](Op op) { return r.counts[static_cast<int>(op)]; };
    CHECK(count(Op::read) == reads && count(Op::write) == writes, "case ", i, ": accesses were lost");
    CHECK(count(Op::comp) == comps && count(Op::near_read) == w.near_accesses, "case ", i, ": products were lost");
    CHECK(r.cycles >= r.data_bus_cycles, "case ", i, ": faster than the data bus");
  }
}

TEST(pim_serves_every_request) {
  Model m;
  m.layers = 2, m.hidden = 256, m.heads = 4, m.kv_heads = 2, m.head_dim = 64, m.intermediate = 512, m.vocab = 100;
  m.experts = 4, m.top_k = 2;
  for (Scheduler s : {Scheduler::processor, Scheduler::neupims, Scheduler::blocked, Scheduler::co_processing}) {
    const PimKind kind = needs_units(s) ? PimKind::banks : needs_near(s) ? PimKind::near : PimKind::none;
    System system(device_of(kind, 2), m, {2, 1, 2, false}, s);
    std::vector<Request> requests;
    for (int64_t i = 0; i < 30; ++i) requests.push_back({double(i % 3), 1 + i * 7, 1 + i % 9, 0});
    for (const bool limited : {false, true}) {
      Server server(&system, requests, {8, true, true, limited, 1});
      while (server.advance(4)) {
      }
      CHECK(server.report().finished == 30, "requests were lost");
    }
  }
}

TEST(pim_packing_keeps_to_the_room) {
  std::mt19937 random(11);
  const auto below = [&](int64_t n) { return static_cast<int64_t>(random() % static_cast<uint64_t>(n)); };
  for (int i = 0; i < 60; ++i) {
    const int64_t channels = 1 + below(6), requests = below(20);
    Room room;
    for (int64_t c = 0; c < channels; ++c) room.free.push_back(double(below(12)));
    std::vector<int64_t> costs, loads(channels);
    for (int64_t r = 0; r < requests; ++r) {
      costs.push_back(1 + below(9));
      room.bytes.push_back(double(1 + below(6)));
    }
    Room turns = room;
    const auto packed = pack_min_load(costs, &loads, &room);
    const auto dealt = pack_round_robin(requests, channels, below(channels), &turns);
    for (const auto& [to, left] : {std::pair{packed, room}, std::pair{dealt, turns}})
      for (int64_t r = 0; r < requests; ++r) {
        CHECK(to[r] >= -1 && to[r] < channels, "case ", i, ": no such channel");
        for (double free : left.free) {
          CHECK(free >= 0, "case ", i, ": a channel holds more than it can");
          CHECK(to[r] >= 0 || free < left.bytes[r], "case ", i, ": a request waits beside room for it");
        }
      }
  }
}

}  // namespace
}  // namespace effops::test
