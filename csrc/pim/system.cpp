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

}  // namespace

System::System(const Device& device, const Model& model, const Split& split, Scheduler scheduler)
    : rates_(device), model_(model), split_(split), scheduler_(scheduler) {}

AttentionShape System::shape() const {
  const int64_t kv_heads = ceil_div(model_.kv_heads, split_.tensor);  // a KV head lies on all devices that need it
  return {kv_heads, model_.head_dim, ceil_div(ceil_div(model_.heads, split_.tensor), kv_heads), model_.value_bytes};
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
    w.write_bytes += double(s.kv_heads * s.group * s.head_dim * model_.value_bytes);
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

double System::near_ns(double flops, double bytes, double stretch) const {
  return std::max(flops / (device().pim.peak_tflops * 1e3), stretch * rates_.near_ns(bytes));
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

StageReport System::layer(const Batch& b, bool with_experts, double experts_ns) {
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
    run(Part::experts, gemm(b.rows, model_.hidden, model_.experts), 1, &r);  // the gate
    pass(Part::experts, experts_ns, &r);
    const double bytes = double(b.rows * model_.top_k * model_.hidden * model_.value_bytes);
    communicate(bytes / double(split_.tensor), true, 2, &r);
    communicate(double(b.rows * model_.hidden * model_.value_bytes), false, 1, &r);
    run(Part::vector, elementwise(VectorOp::add, b.rows, model_.hidden), 1, &r);
  } else {
    feed_forward(b, &r);
  }
  return r;
}

void System::feed_forward(const Batch& b, StageReport* r) const {
  const int64_t width = ceil_div(model_.intermediate, split_.tensor);
  run(Part::ffn, gemm(b.rows, model_.hidden, (model_.ffn_matrices - 1) * width), 1, r);
  run(Part::vector, elementwise(VectorOp::activation, b.rows, width), 1, r);
  run(Part::ffn, gemm(b.rows, width, model_.hidden), 1, r);
  communicate(double(b.rows * model_.hidden * model_.value_bytes), false, 1, r);
  run(Part::vector, elementwise(VectorOp::add, b.rows, model_.hidden), 1, r);
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
    const double values = double(model_.value_bytes) * heads * double(len + s.head_dim);
    moved.write_bytes += values;
    r->external_bytes += n * values;  // results, as many as vectors; their energy is the units'
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

// Prompts are the processor's, decoding is whose it is sooner done on.
void System::near_attention(const Batch& b, StageReport* r) const {
  const Work prompts = prefill_attention(b), decode = decode_attention(b);
  const double bytes = decode.read_bytes + decode.write_bytes;
  const double ahead = b.prefill.empty() ? 0 : ns_of(prompts, 1);
  const double near = b.decode.empty() ? 0 : near_ns(decode.flops, bytes);
  const double own = b.decode.empty() ? 0 : ns_of(decode, 1);
  double with_near = ahead + near;
  if (scheduler_ == Scheduler::co_processing && near > 0) {
    const double stretch = near_ns(decode.flops, bytes, rates_.units_stretch()) / near;
    const auto [a, b] = side_by_side(ahead, rates_.transfer_stretch(), near, stretch);
    with_near = std::min(with_near, std::max(a, b));
  }
  spend(prompts, r);
  if (with_near <= ahead + own) near_spend(decode.flops, bytes, r);
  else spend(decode, r);
  pass(Part::attention, std::min(with_near, ahead + own), r);
  // A prompt's keys and values go to where decoding reads them.
  Work moved;
  const AttentionShape s = shape();
  for (int64_t len : b.prefill)
    moved.read_bytes += 2.0 * double(s.kv_heads * s.head_dim * model_.value_bytes) * double(len);
  moved.write_bytes = moved.read_bytes;
  run(Part::attention, moved, 0, r);
}

// Experts lie over nodes or over all devices; a device's own are served by one processor each.
System::Experts System::experts(const std::vector<int64_t>& tokens) const {
  Experts all;
  const int64_t hosts = split_.split_experts ? split_.data : split_.tensor * split_.data;
  const int64_t here = ceil_div(model_.experts, hosts);
  // More devices than experts: one expert over several.
  const int64_t over = split_.split_experts ? split_.tensor : std::max<int64_t>(1, hosts / model_.experts);
  const int64_t width = ceil_div(model_.intermediate, over);
  double busy = 0;
  for (int64_t first = 0; first < model_.experts; first += here) {
    const std::vector<int64_t> n(tokens.begin() + first, tokens.begin() + std::min(first + here, model_.experts));
    std::vector<Work> work(n.size());
    std::vector<double> processor(n.size()), near(n.size()), beside(n.size());
    double on_processor = 0, on_near = 0;
    for (size_t e = 0; e < n.size(); ++e) {
      if (n[e] == 0) continue;
      work[e] = gemm(n[e], model_.hidden, (model_.ffn_matrices - 1) * width);
      work[e] += gemm(n[e], width, model_.hidden);
      on_processor += processor[e] = ns_of(work[e], 1);
      if (!needs_near(scheduler_)) continue;
      const double bytes = work[e].read_bytes + work[e].write_bytes;
      on_near += near[e] = near_ns(work[e].flops, bytes);
      beside[e] = near_ns(work[e].flops, bytes, rates_.units_stretch());
    }
    std::vector<bool> is_near(n.size());
    double ns = on_processor;
    if (scheduler_ == Scheduler::co_processing) {
      const int64_t count = static_cast<int64_t>(n.size());
      const ExpertSplit best = split_experts(n, processor, near, sections(count), beside, rates_.transfer_stretch());
      ns = best.ns, is_near = best.near;
    } else if (scheduler_ == Scheduler::duplex && on_near < on_processor) {
      ns = on_near, is_near.assign(n.size(), true);
    }
    all.ns = std::max(all.ns, ns);
    for (size_t e = 0; e < n.size(); ++e) {
      StageReport one;
      if (is_near[e]) near_spend(work[e].flops, work[e].read_bytes + work[e].write_bytes, &one);
      else spend(work[e], &one);
      busy += one.pim_busy_ns;
      one.pim_busy_ns = 0;
      all.spent += times(one, double(over) / double(split_.tensor));  // spend counts a node's devices
    }
  }
  all.spent.pim_busy_ns = busy * double(here) / double(model_.experts);
  return all;
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

double System::idle_mw() const {
  const Energy& e = device().energy;
  const double channel = e.background_mw + e.extra_row_buffer_mw + device().refresh_mw();
  return channel * double(device().memory.channels) * double(split_.devices());
}

double System::weight_bytes() const {
  return model_.other_bytes() / double(split_.tensor * split_.pipeline) +
         model_.expert_bytes() / double(split_.devices());
}

double System::kv_bytes(int64_t tokens) const {
  const AttentionShape s = shape();
  return 2.0 * double(model_.layers / split_.pipeline) * double(s.kv_heads * s.head_dim * s.value_bytes) *
         double(tokens);
}

bool System::fits(const Stage& stage) const {
  const double room = room_bytes();
  if (room < 0) return false;
  std::vector<std::vector<double>> used(split_.data, std::vector<double>(rooms()));
  std::vector<double> all(split_.data);
  const auto group = [&](const std::vector<int64_t>& part, size_t i) {
    return (part.empty() ? static_cast<int64_t>(i) % split_.parts() : part[i]) % split_.data;
  };
  for (size_t i = 0; i < stage.decode.size(); ++i) {
    const int64_t g = group(stage.decode_part, i), c = rooms() > 1 && !stage.channel.empty() ? stage.channel[i] : 0;
    used[g][c] += kv_bytes(stage.decode[i]);
    all[g] += kv_bytes(stage.decode[i]);
  }
  for (size_t i = 0; i < stage.prefill.size(); ++i)  // in channels only once they decode
    all[group(stage.prefill_part, i)] += kv_bytes(stage.prefill[i]);
  for (int64_t g = 0; g < split_.data; ++g)
    if (all[g] > room * double(rooms()) || *std::max_element(used[g].begin(), used[g].end()) > room) return false;
  return true;
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
    feed_forward(b, &after[h]);
  }
  // What the units need beyond the arrays' side is attention's.
  const auto together = [&](const StageReport& side, double units_ns) {
    StageReport r = side;
    const auto [processor, beside] = overlapped(side.ns, units_ns);
    if (side.ns > 0)
      for (double& part : r.part_ns) part *= processor / side.ns;
    r.ns = processor;
    if (beside > processor) pass(Part::attention, beside - processor, &r);
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
  if (stage.decode.empty() && stage.prefill.empty()) return total;
  const int64_t parts = split_.parts();
  const auto members = [&](const std::vector<int64_t>& part_of, size_t count, int64_t part) {
    std::vector<int64_t> found;
    for (size_t i = 0; i < count; ++i)
      if ((part_of.empty() ? static_cast<int64_t>(i) % parts : part_of[i]) == part)
        found.push_back(static_cast<int64_t>(i));
    return found;
  };
  const int64_t with_experts = model_.expert_layers();
  const double share = 1.0 / double(split_.pipeline);  // a device has so much of the layers
  for (int64_t p = 0; p < split_.pipeline; ++p) {      // it takes the parts of a pipeline one after another
    std::vector<Batch> groups;
    std::vector<int64_t> ends;  // sequences whose next token is asked for
    int64_t tokens = 0;
    for (int64_t d = 0; d < split_.data; ++d) {
      const int64_t part = p * split_.data + d;
      const auto requests = members(stage.decode_part, stage.decode.size(), part);
      const auto prompts = members(stage.prefill_part, stage.prefill.size(), part);
      groups.push_back(batch_of(stage, requests, prompts));
      ends.push_back(static_cast<int64_t>(requests.size() + prompts.size()));
      tokens += groups.back().rows;
    }
    Experts routed;
    if (with_experts > 0 && tokens > 0) routed = experts(expert_tokens(tokens, seed * 31 + uint64_t(p)));
    total += times(routed.spent, double(with_experts));
    total.pim_busy_ns -= routed.spent.pim_busy_ns * double(with_experts) * (1 - share);
    StageReport slowest;
    double busy = 0;
    for (int64_t d = 0; d < split_.data; ++d) {  // groups wait for each other
      const Batch& b = groups[d];
      StageReport layers = times(layer(b, false, 0), double(model_.layers - with_experts));
      if (with_experts > 0) layers += times(layer(b, true, routed.ns), double(with_experts));
      const bool can_interleave = b.prefill.empty() && with_experts == 0 && b.decode.size() > 1;
      if (can_interleave && (scheduler_ == Scheduler::interleaved || scheduler_ == Scheduler::neupims)) {
        const StageReport two = interleaved_layers(b, halve_batch(b.channel, device().memory.channels), model_.layers);
        if (scheduler_ == Scheduler::interleaved || two.ns < layers.ns) layers = two;
        if (scheduler_ == Scheduler::neupims) {  // algorithm 3 goes by the order of requests, which may lie badly
          const StageReport other = interleaved_layers(b, halve_by_length(b.decode), model_.layers);
          if (other.ns < layers.ns) layers = other;
        }
      }
      layers.ns *= share;  // time is one device's, bytes and energy are all devices'
      for (double& x : layers.part_ns) x *= share;
      layers.pim_busy_ns *= share;
      if (model_.vocab > 0)
        run(Part::head, gemm(ends[d], model_.hidden, ceil_div(model_.vocab, split_.tensor)), 1, &layers);
      busy += layers.pim_busy_ns / double(split_.data);
      if (layers.ns > slowest.ns) slowest.ns = layers.ns, slowest.part_ns = layers.part_ns;
      layers.ns = layers.pim_busy_ns = 0;
      layers.part_ns = {};
      total += layers;
    }
    slowest.pim_busy_ns = busy;
    total += slowest;
  }
  total.background_pj = total.ns * idle_mw();
  return total;
}

}  // namespace effops::pim
