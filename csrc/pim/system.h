// A model on devices under a scheduler: time, bytes and energy of one stage, the forward pass of a batch in which
// sequences decode a token or are prefilled.
#pragma once

#include <array>
#include <cstdint>
#include <unordered_map>
#include <utility>
#include <vector>

#include "pim/model.h"
#include "pim/placement.h"
#include "pim/processor.h"
#include "pim/rates.h"

namespace effops::pim {

enum class Scheduler : uint8_t {
  processor,      // all on the GPU or the NPU
  blocked,        // attention of decoding at the banks, processor and units by turns
  serial,         // two row buffers, one batch
  interleaved,    // and two sub-batches
  neupims,        // the sooner of the two
  duplex,         // processor or near processor, one at a time
  co_processing,  // both at once, experts and attention divided
};
bool needs_units(Scheduler s);  // of PimKind::banks
bool needs_near(Scheduler s);

enum class Part : uint8_t { qkv, attention, projection, ffn, experts, vector, communication, head };
constexpr int kParts = 8;
const char* name_of(Part part);

struct Stage {
  std::vector<int64_t> decode;                     // keys of each sequence, the new token's among them
  std::vector<int64_t> channel;                    // that holds its keys (units at the banks only)
  std::vector<int64_t> prefill;                    // tokens of each prompt that joins
  std::vector<int64_t> decode_part, prefill_part;  // of the batch, in which each is; empty: by turns
};

struct StageReport {
  double ns = 0;
  std::array<double, kParts> part_ns{};       // of the critical path; their sum is ns
  double processor_flops = 0, pim_flops = 0;  // of all devices
  double external_bytes = 0, pim_bytes = 0;
  double pim_busy_ns = 0;  // of a device's units, all channels' mean
  double memory_pj = 0, pim_pj = 0, compute_pj = 0, link_pj = 0, background_pj = 0;

  double pj() const { return memory_pj + pim_pj + compute_pj + link_pj + background_pj; }
  StageReport& operator+=(const StageReport& o);
};

class System {
 public:
  System(const Device& device, const Model& model, const Split& split, Scheduler scheduler);

  StageReport step(const Stage& stage, uint64_t seed = 0);

  const Device& device() const { return rates_.device(); }
  const Rates& rates() const { return rates_; }
  const Model& model() const { return model_; }
  const Split& split() const { return split_; }
  Scheduler scheduler() const { return scheduler_; }
  AttentionShape shape() const;  // of a device
  // Of a matrix times `rows` vectors on either side of a device.
  double units_ns(int64_t rows, int64_t out, int64_t in) const;
  double processor_ns(int64_t rows, int64_t out, int64_t in) const { return ns_of(gemm(rows, in, out), 1); }
  // Cycles of a sequence's attention in its channel.
  double attention_cycles(int64_t len);
  // How long a processor's stretch of work and the units' take side by side: both are slower while both are at work.
  std::pair<double, double> overlapped(double processor_ns, double units_ns) const {
    return side_by_side(processor_ns, rates_.transfer_stretch(), units_ns, rates_.units_stretch());
  }
  // Milliwatts of all memories while nothing is done, refresh included.
  double idle_mw() const;

  // Sections of memory that `experts` of a device lie in by turns, each served by one side: a near processor's bundles
  // where there are more experts (Duplex), else 0, every expert by itself.
  int64_t sections(int64_t experts) const {
    const int64_t bundles = device().bundles();
    return bundles > 1 && experts > bundles ? bundles : 0;
  }

  // Memory of one device: weights, and a request's keys and values. Units at the banks have those of a request in one
  // channel, so that room is counted by channel; elsewhere they lie over all of them.
  double weight_bytes() const;
  double kv_bytes(int64_t tokens) const;
  int64_t rooms() const { return needs_units(scheduler_) ? device().memory.channels : 1; }
  double room_bytes() const { return (device().capacity() - weight_bytes()) / double(rooms()); }
  bool fits(const Stage& stage) const;

 private:
  struct Batch;  // the tokens of a layer on one device
  struct Gemv {
    GemvCost logits, context;
  };

  Batch batch_of(const Stage& stage, const std::vector<int64_t>& requests, const std::vector<int64_t>& prompts) const;
  const Gemv& gemv(int64_t len);
  Work gemm(int64_t rows, int64_t in, int64_t out) const;
  Work elementwise(VectorOp op, int64_t rows, int64_t n) const;
  Work prefill_attention(const Batch& b) const;
  Work decode_attention(const Batch& b) const;
  bool blocked() const { return scheduler_ == Scheduler::blocked || device().pim.row_buffers == 1; }
  double memory_ns(const Work& w) const;
  double ns_of(const Work& w, int64_t kernels) const;

  double run(Part part, const Work& w, int64_t kernels, StageReport* r) const;
  void spend(const Work& w, StageReport* r) const;
  void communicate(double bytes, bool between_nodes, int64_t times, StageReport* r) const;

  // Experts of a layer on all devices: how long the slowest takes, and what all spend.
  struct Experts {
    double ns = 0;
    StageReport spent;
  };
  StageReport layer(const Batch& b, bool with_experts, double experts_ns);
  StageReport interleaved_layers(const Batch& whole, const std::vector<int64_t>& half, int64_t layers);
  void qkv(const Batch& b, StageReport* r) const;
  void rest(const Batch& b, StageReport* r) const;
  void feed_forward(const Batch& b, StageReport* r) const;
  Experts experts(const std::vector<int64_t>& tokens) const;
  double units_attention(const Batch& b, StageReport* r);
  void near_attention(const Batch& b, StageReport* r) const;
  double near_ns(double flops, double bytes, double stretch = 1) const;
  void near_spend(double flops, double bytes, StageReport* r) const;
  std::vector<int64_t> expert_tokens(int64_t tokens, uint64_t seed) const;

  Rates rates_;
  Model model_;
  Split split_;
  Scheduler scheduler_;
  std::unordered_map<int64_t, Gemv> gemv_;
};

}  // namespace effops::pim
