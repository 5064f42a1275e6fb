#include "pim/system.h"

#include <algorithm>
#include <cmath>

namespace effops::pim {

struct System::Batch {
  std::vector<int64_t> decode, channel, prefill;
  int64_t rows = 0;  // tokens of the layer
};

bool needs_units(Scheduler s) {
  return s == Scheduler::blocked || s == Scheduler::serial || s == Scheduler::interleaved || s == Scheduler::neupims;
}
bool needs_near(Scheduler s) { return s == Scheduler::duplex || s == Scheduler::co_processing; }

const char* name_of(Part part) {
  static constexpr const char* names[kParts] = {"qkv",     "attention", "projection",    "ffn",
                                                "experts", "vector",    "communication", "head"};
  return names[static_cast<int>(part)];
}

StageReport& StageReport::operator+=(const StageReport& o) {
  ns += o.ns;
  for (int i = 0; i < kParts; ++i) part_ns[i] += o.part_ns[i];
  processor_flops += o.processor_flops, pim_flops += o.pim_flops;
  external_bytes += o.external_bytes, pim_bytes += o.pim_bytes, pim_busy_ns += o.pim_busy_ns;
  memory_pj += o.memory_pj, pim_pj += o.pim_pj, compute_pj += o.compute_pj, link_pj += o.link_pj;
  background_pj += o.background_pj;
  return *this;
}

namespace {

StageReport times(StageReport r, double n) {
  r.ns *= n;
  for (double& part : r.part_ns) part *= n;
  r.processor_flops *= n, r.pim_flops *= n, r.external_bytes *= n, r.pim_bytes *= n, r.pim_busy_ns *= n;
  r.memory_pj *= n, r.pim_pj *= n, r.compute_pj *= n, r.link_pj *= n, r.background_pj *= n;
  return r;
}

void pass(Part part, double ns, StageReport* r) {
  r->part_ns[static_cast<int>(part)] += ns;
  r->ns += ns;
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace

System::System(const Device& device, const Model& model, const Split& split, Scheduler scheduler)
    : rates_(device), model_(model), split_(split), scheduler_(scheduler) {}

AttentionShape System::shape() const {
  return {ceil_div(model_.kv_heads, split_.tensor), model_.head_dim, model_.group(), model_.value_bytes};
}

const System::Gemv& System::gemv(int64_t len) {
  auto [it, fresh] = gemv_.try_emplace(len);
  if (fresh) {
    std::vector<GemvStep> logits, context;
    add_logits(device(), shape(), len, &logits);
    add_context(device(), shape(), len, &context);
    it->second = {cost_of(rates_, logits), cost_of(rates_, context)};
  }
  return it->second;
}

double System::attention_cycles(int64_t len) {
  const Gemv& g = gemv(len);
  return g.logits.cycles + g.context.cycles;
}

// Operators
Work System::gemm(int64_t rows, int64_t in, int64_t out) const {
  Work w;
  if (rows <= 0) return w;
  const double b = double(model_.value_bytes);
  w.compute_ns = gemm_ns(device().processor, rows, in, out);
  w.flops = 2.0 * double(rows) * double(in) * double(out);
  w.read_bytes = b * (double(in) * double(out) + double(rows) * double(in));
  w.write_bytes = b * double(rows) * double(out);
  return w;
}

Work System::elementwise(VectorOp op, int64_t rows, int64_t n) const {
  Work w;
  w.compute_ns = vector_ns(device().processor, op, rows, n);
  if (device().processor.kind == ProcessorKind::roofline) {  // arrays keep activations on the chip
    w.read_bytes = double(rows * n * model_.value_bytes) * (op == VectorOp::add ? 2 : 1);
    w.write_bytes = double(rows * n * model_.value_bytes);
  }
  return w;
}

Work System::prefill_attention(const Batch& b) const {
  Work w;
  const AttentionShape s = shape();
  for (int64_t len : b.prefill) {  // causal: half the scores
    const double flops = 2.0 * double(s.kv_heads * s.group) * double(len) * double(len) * double(s.head_dim);
    w.flops += flops;
    // Arrays take whole tiles: scores and their products with the values, half of each.
    w.compute_ns += device().processor.kind == ProcessorKind::roofline
                        ? flops / (device().processor.peak_tflops * 1e3)
                        : gemm_ns(device().processor, len, s.head_dim, len, s.kv_heads * s.group);
    w.read_bytes += double((2 * s.kv_heads + s.kv_heads * s.group) * s.head_dim * model_.value_bytes) * double(len);
    w.write_bytes += double(s.kv_heads * s.group * s.head_dim * model_.value_bytes) * double(len);
  }
  return w;
}

Work System::decode_attention(const Batch& b) const {
  Work w;
  const AttentionShape s = shape();
  double softmax = 0;
  for (int64_t len : b.decode) {
    w.compute_ns += double(s.kv_heads) * attention_head_ns(device().processor, len, s.head_dim, s.group);
    softmax += vector_ns(device().processor, VectorOp::softmax, s.kv_heads * s.group, len);
    w.flops += 4.0 * double(s.kv_heads * s.group) * double(len) * double(s.head_dim);
    w.read_bytes += 2.0 * double(s.kv_heads * s.head_dim * model_.value_bytes) * double(len);
    w.write_bytes += 2.0 * double(s.kv_heads * s.head_dim * model_.value_bytes);  // the new key and value
  }
  w.compute_ns = std::max(w.compute_ns, softmax);  // vector units take one head's while the arrays take the next
  return w;
}

// Time, bytes and energy
double System::memory_ns(const Work& w) const { return rates_.read_ns(w.read_bytes) + rates_.write_ns(w.write_bytes); }
double System::ns_of(const Work& w, int64_t kernels) const {
  return std::max(w.compute_ns, memory_ns(w)) + double(kernels) * device().processor.launch_us * 1e3;
}

void System::spend(const Work& w, StageReport* r) const {
  const double n = double(split_.tensor);
  r->processor_flops += n * w.flops;
  r->external_bytes += n * (w.read_bytes + w.write_bytes);
  r->memory_pj += n * (rates_.read_pj(w.read_bytes) + rates_.write_pj(w.write_bytes));
  r->compute_pj += n * w.flops * device().energy.flop;
}

double System::run(Part part, const Work& w, int64_t kernels, StageReport* r) const {
  if (w.flops == 0 && w.read_bytes == 0 && w.compute_ns == 0) return 0;
  spend(w, r);
  const double ns = ns_of(w, kernels);
  pass(part, ns, r);
  return ns;
}

// All-reduce of every device's `bytes` in a ring; between nodes, bytes that cross.
void System::communicate(double bytes, bool between_nodes, int64_t count, StageReport* r) const {
  const Link& link = device().link;
  const double n = double(between_nodes ? split_.data : split_.tensor);
  const double rate = between_nodes ? link.node_gb_per_s : link.gb_per_s;
  if (n <= 1 || rate <= 0 || bytes <= 0) return;
  const double moved = bytes * (between_nodes ? (n - 1) / n : 2 * (n - 1) / n);
  const double latency = (between_nodes ? link.node_latency_us : link.latency_us) * 1e3;
  pass(Part::communication, double(count) * (moved / rate + latency), r);
  r->link_pj += double(count) * moved * double(split_.tensor) * device().energy.link_byte;
}

double System::near_ns(double flops, double bytes) const {
  return std::max(flops / (device().pim.peak_tflops * 1e3), rates_.near_ns(bytes));
}
void System::near_spend(double flops, double bytes, StageReport* r) const {
  const double n = double(split_.tensor);
  r->pim_flops += n * flops;
  r->pim_bytes += n * bytes;
  r->pim_busy_ns += near_ns(flops, bytes);
  r->pim_pj += n * rates_.near_pj(bytes);
  r->compute_pj += n * flops * device().energy.flop;
}

double System::units_ns(int64_t rows, int64_t out, int64_t in) const {
  const Device& d = device();
  if (d.pim.kind == PimKind::near)
    return near_ns(2.0 * double(rows) * double(in) * double(out),
                   double(model_.value_bytes) * double(in) * double(out));
  std::vector<GemvStep> steps;  // the fullest channel's rows of the matrix, for every vector anew
  const int64_t tiles = ceil_div(ceil_div(out, d.memory.banks()), d.memory.channels);
  add_gemv(d, tiles * d.memory.banks(), in, model_.value_bytes, &steps);
  return double(rows) * cost_of(rates_, steps).cycles / d.memory.clock_ghz;
}

// The parts of a layer
void System::qkv(const Batch& b, StageReport* r) const {
  const AttentionShape s = shape();
  run(Part::vector, elementwise(VectorOp::layer_norm, b.rows, model_.hidden), 1, r);
  run(Part::qkv, gemm(b.rows, model_.hidden, (s.group + 2) * s.kv_heads * s.head_dim), 1, r);
}

void System::rest(const Batch& b, StageReport* r) const {
  const AttentionShape s = shape();
  const double activations = double(b.rows * model_.hidden * model_.value_bytes);
  run(Part::projection, gemm(b.rows, s.group * s.kv_heads * s.head_dim, model_.hidden), 1, r);
  communicate(activations, false, 1, r);
  run(Part::vector, elementwise(VectorOp::add, b.rows, model_.hidden), 1, r);
  run(Part::vector, elementwise(VectorOp::layer_norm, b.rows, model_.hidden), 1, r);
}

StageReport System::layer(const Batch& b, bool with_experts, const std::vector<int64_t>& tokens) {
  StageReport r;
  if (b.rows == 0) return r;
  qkv(b, &r);
  if (needs_units(scheduler_)) {
    const Work prompts = prefill_attention(b);
    const double ahead = b.prefill.empty() ? 0 : ns_of(prompts, 1), units = units_attention(b, &r);
    spend(prompts, &r);
    pass(Part::attention, blocked() ? ahead + units : std::max(ahead, units), &r);
  } else if (needs_near(scheduler_)) {
    near_attention(b, &r);
  } else {
    const int64_t requests = static_cast<int64_t>(b.decode.size());
    run(Part::attention, prefill_attention(b), 1, &r);
    run(Part::attention, decode_attention(b), std::max<int64_t>(1, requests * device().processor.kernels_per_request),
        &r);
  }
  rest(b, &r);
  if (with_experts) {
    experts(b, tokens, &r);
  } else {
    const int64_t width = ceil_div(model_.intermediate, split_.tensor);
    run(Part::ffn, gemm(b.rows, model_.hidden, (model_.ffn_matrices - 1) * width), 1, &r);
    run(Part::vector, elementwise(VectorOp::activation, b.rows, width), 1, &r);
    run(Part::ffn, gemm(b.rows, width, model_.hidden), 1, &r);
  }
  communicate(double(b.rows * model_.hidden * model_.value_bytes), false, 1, &r);
  run(Part::vector, elementwise(VectorOp::add, b.rows, model_.hidden), 1, &r);
  return r;
}

// Decoding at the banks: a channel's requests one after another, channels side by side.
double System::units_attention(const Batch& b, StageReport* r) {
  const int64_t channels = device().memory.channels;
  std::vector<double> logits(channels), context(channels);
  double softmax = 0, first = 0, comps = 0;
  const AttentionShape s = shape();
  const double heads = double(s.kv_heads * s.group), n = double(split_.tensor);
  Work moved;  // queries in, probabilities in; logits and outputs return as results
  for (size_t i = 0; i < b.decode.size(); ++i) {
    const int64_t len = b.decode[i];
    const Gemv& g = gemv(len);
    logits[b.channel[i]] += g.logits.cycles;
    context[b.channel[i]] += g.context.cycles;
    comps += double(g.logits.comps + g.context.comps);
    const double one = vector_ns(device().processor, VectorOp::softmax, s.kv_heads * s.group, len);
    softmax += one;
    first = std::max(first, one);
    moved.write_bytes +=
        double(model_.value_bytes) * (heads * double(len + s.head_dim) + 2.0 * double(s.kv_heads * s.head_dim));
    r->pim_flops += n * 4.0 * heads * double(len) * double(s.head_dim);
    r->pim_bytes += n * 2.0 * double(s.kv_heads * s.head_dim * model_.value_bytes) * double(len);
    r->pim_pj += n * (g.logits.pj + g.context.pj);
  }
  if (b.decode.empty()) return 0;
  spend(moved, r);
  r->pim_busy_ns += comps * double(device().pim.comp_interval) / device().memory.clock_ghz / double(channels);
  const auto slowest = [&](const std::vector<double>& cycles) {
    return *std::max_element(cycles.begin(), cycles.end()) / device().memory.clock_ghz;
  };
  // Blocked: results leave when the units rest, so that softmax waits for all logits and the products for all of it.
  if (blocked()) return slowest(logits) + softmax + memory_ns(moved) + slowest(context);
  for (int64_t c = 0; c < channels; ++c) logits[c] += context[c];
  return std::max(slowest(logits), softmax) + first;
}

// Processor and near processor: prompts on the one, decoding on the other.
void System::near_attention(const Batch& b, StageReport* r) const {
  const Work prompts = prefill_attention(b), decode = decode_attention(b);
  const double near = b.decode.empty() ? 0 : near_ns(decode.flops, decode.read_bytes);
  const double ahead = b.prefill.empty() ? 0 : ns_of(prompts, 1);
  spend(prompts, r);
  if (!b.decode.empty()) near_spend(decode.flops, decode.read_bytes, r);
  pass(Part::attention, scheduler_ == Scheduler::co_processing ? std::max(ahead, near) : ahead + near, r);
}

void System::experts(const Batch& b, const std::vector<int64_t>& tokens, StageReport* r) const {
  const int64_t here = split_.split_experts ? model_.experts / std::max<int64_t>(1, split_.data)
                                            : ceil_div(model_.experts, split_.tensor * split_.data);
  const int64_t width = split_.split_experts ? ceil_div(model_.intermediate, split_.tensor) : model_.intermediate;
  run(Part::experts, gemm(b.rows, model_.hidden, model_.experts), 1, r);  // the gate
  // More devices than experts: one expert over several.
  const int64_t over = split_.split_experts ? 1 : std::max<int64_t>(1, split_.tensor * split_.data / model_.experts);
  double slowest = 0, busy = 0;
  for (int64_t first = 0; first < model_.experts; first += here) {  // every device that holds others
    std::vector<int64_t> n(tokens.begin() + first, tokens.begin() + std::min(first + here, model_.experts));
    std::vector<Work> work(n.size());
    std::vector<double> processor(n.size()), near(n.size());
    for (size_t e = 0; e < n.size(); ++e) {
      if (n[e] == 0) continue;
      work[e] = gemm(n[e], model_.hidden, (model_.ffn_matrices - 1) * width / over);
      work[e] += gemm(n[e], width / over, model_.hidden);
      processor[e] = ns_of(work[e], 1);
      near[e] = needs_near(scheduler_) ? near_ns(work[e].flops, work[e].read_bytes) : 0;
    }
    double on_processor = 0, on_near = 0;
    for (size_t e = 0; e < n.size(); ++e) on_processor += processor[e], on_near += near[e];
    std::vector<bool> is_near(n.size());
    double ns = on_processor;
    if (scheduler_ == Scheduler::co_processing) {
      const ExpertSplit best = split_experts(n, processor, near, n.size() > 4 ? 4 : 0);
      ns = best.ns, is_near = best.near;
    } else if (scheduler_ == Scheduler::duplex && on_near < on_processor) {
      ns = on_near, is_near.assign(n.size(), true);
    }
    slowest = std::max(slowest, ns);
    StageReport share;
    for (size_t e = 0; e < n.size(); ++e) {
      if (is_near[e]) near_spend(work[e].flops, work[e].read_bytes, &share);
      else spend(work[e], &share);
    }
    busy += share.pim_busy_ns;
    share.pim_busy_ns = 0;
    // An expert lies on the devices of one node or on `over` devices, and every data group comes by here.
    *r += times(share,
                split_.split_experts ? 1.0 / double(split_.data) : double(over) / double(split_.tensor * split_.data));
  }
  r->pim_busy_ns += busy * double(here) / double(model_.experts);
  pass(Part::experts, slowest, r);
  const double bytes = double(b.rows * model_.top_k * model_.hidden * model_.value_bytes);
  communicate(bytes / double(split_.tensor), true, 2, r);
}

// Tokens of each expert when every token takes top_k different ones at random.
std::vector<int64_t> System::expert_tokens(int64_t tokens, uint64_t seed) const {
  std::vector<int64_t> count(model_.experts);
  uint64_t state = seed * 0x9E3779B97F4A7C15u + 0x243F6A8885A308D3u;
  const auto next = [&] {  // splitmix64
    uint64_t z = state += 0x9E3779B97F4A7C15u;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
    z = (z ^ z >> 27) * 0x94D049BB133111EBu;
    return z ^ z >> 31;
  };
  std::vector<int64_t> taken(model_.top_k);
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t k = 0; k < model_.top_k; ++k) {
      int64_t e;
      do e = static_cast<int64_t>(next() % static_cast<uint64_t>(model_.experts));
      while (std::find(taken.begin(), taken.begin() + k, e) != taken.begin() + k);
      taken[k] = e;
      ++count[e];
    }
  return count;
}

// Two sub-batches by turns (NeuPIMs, figure 11): A, B, then C and D for every further layer, E, F.
StageReport System::interleaved_layers(const Batch& whole, const std::vector<int64_t>& half, int64_t layers) {
  Batch parts[2];
  for (size_t i = 0; i < whole.decode.size(); ++i) {
    parts[half[i]].decode.push_back(whole.decode[i]);
    parts[half[i]].channel.push_back(whole.channel[i]);
  }
  StageReport before[2], attention[2], after[2];
  double units[2];
  for (int h = 0; h < 2; ++h) {
    Batch& b = parts[h];
    b.rows = static_cast<int64_t>(b.decode.size());
    qkv(b, &before[h]);
    units[h] = units_attention(b, &attention[h]);
    rest(b, &after[h]);
    const int64_t width = ceil_div(model_.intermediate, split_.tensor);
    run(Part::ffn, gemm(b.rows, model_.hidden, (model_.ffn_matrices - 1) * width), 1, &after[h]);
    run(Part::vector, elementwise(VectorOp::activation, b.rows, width), 1, &after[h]);
    run(Part::ffn, gemm(b.rows, width, model_.hidden), 1, &after[h]);
    communicate(double(b.rows * model_.hidden * model_.value_bytes), false, 1, &after[h]);
    run(Part::vector, elementwise(VectorOp::add, b.rows, model_.hidden), 1, &after[h]);
  }
  // Both sides take longer while both are at work; what the units need beyond the arrays' side is attention's.
  const auto together = [&](const StageReport& side, double units_ns) {
    StageReport r = side;
    double processor = side.ns;
    if (units_ns > 0 && processor > 0) {
      const double a = rates_.transfer_stretch(), b = rates_.gemv_stretch();
      if (processor * a <= units_ns * b) {
        processor *= a;
        units_ns += processor * (1 - 1 / b);
      } else {
        const double both = units_ns * b;
        processor += both * (1 - 1 / a);
        units_ns = both;
      }
    }
    if (side.ns > 0)
      for (double& part : r.part_ns) part *= processor / side.ns;
    r.ns = processor;
    if (units_ns > processor) pass(Part::attention, units_ns - processor, &r);
    return r;
  };
  StageReport r = before[0];           // A
  r += together(before[1], units[0]);  // B
  if (layers > 1) {
    StageReport c = after[0], d = after[1];
    c += before[0];
    d += before[1];
    c = together(c, units[1]);
    c += together(d, units[0]);
    r += times(c, double(layers - 1));  // C and D
  }
  r += together(after[0], units[1]);                                     // E
  r += after[1];                                                         // F
  for (int h = 0; h < 2; ++h) r += times(attention[h], double(layers));  // bytes and energy; its time is in the stages
  return r;
}

System::Batch System::batch_of(const Stage& stage, const std::vector<int64_t>& requests,
                               const std::vector<int64_t>& prompts) const {
  Batch b;
  for (int64_t i : requests) {
    b.decode.push_back(stage.decode[i]);
    b.channel.push_back(stage.channel.empty() ? 0 : stage.channel[i]);
  }
  for (int64_t i : prompts) b.prefill.push_back(stage.prefill[i]);
  b.rows = static_cast<int64_t>(b.decode.size());
  for (int64_t len : b.prefill) b.rows += len;
  return b;
}

StageReport System::step(const Stage& stage, uint64_t seed) {
  StageReport total;
  int64_t tokens = static_cast<int64_t>(stage.decode.size());
  for (int64_t len : stage.prefill) tokens += len;
  if (tokens == 0) return total;
  const std::vector<int64_t> expert = model_.experts > 0 ? expert_tokens(tokens, seed) : std::vector<int64_t>{};

  double slowest = 0;
  StageReport slow;
  for (int64_t d = 0; d < split_.data; ++d) {
    StageReport group;
    for (int64_t p = 0; p < split_.pipeline; ++p) {  // a device takes the groups of a pipeline one after another
      const int64_t part = d * split_.pipeline + p, parts = split_.data * split_.pipeline;
      std::vector<int64_t> requests, prompts;
      for (int64_t i = part; i < static_cast<int64_t>(stage.decode.size()); i += parts) requests.push_back(i);
      for (int64_t i = part; i < static_cast<int64_t>(stage.prefill.size()); i += parts) prompts.push_back(i);
      const Batch b = batch_of(stage, requests, prompts);
      const int64_t with_experts = model_.expert_layers();
      // Each of the pipeline's devices has layers / pipeline of them at any time: so does this one.
      const double share = 1.0 / double(split_.pipeline);
      StageReport layers = times(layer(b, false, expert), double(model_.layers - with_experts));
      if (with_experts > 0) layers += times(layer(b, true, expert), double(with_experts));
      const bool can_interleave = b.prefill.empty() && with_experts == 0 && b.decode.size() > 1;
      if (can_interleave && (scheduler_ == Scheduler::interleaved || scheduler_ == Scheduler::neupims)) {
        const StageReport two = interleaved_layers(b, halve_batch(b.channel, device().memory.channels), model_.layers);
        if (scheduler_ == Scheduler::interleaved || two.ns < layers.ns) layers = two;
      }
      const double ns = layers.ns;
      StageReport whole = layers;  // time is one device's share, bytes and energy are all devices'
      whole.ns = ns * share;
      for (double& x : whole.part_ns) x *= share;
      whole.pim_busy_ns *= share;
      if (model_.vocab > 0) {
        const int64_t rows = static_cast<int64_t>(requests.size() + prompts.size());
        run(Part::head, gemm(rows, model_.hidden, ceil_div(model_.vocab, split_.tensor)), 1, &whole);
      }
      group += whole;
    }
    if (group.ns > slowest) slowest = group.ns, slow = group;
    total += group;
  }
  total.ns = slowest;
  total.part_ns = slow.part_ns;
  total.pim_busy_ns = slow.pim_busy_ns;
  const Energy& e = device().energy;
  total.background_pj =
      slowest * (e.background_mw + e.extra_row_buffer_mw) * double(device().memory.channels) * double(split_.devices());
  return total;
}

}  // namespace effops::pim
