// append_labels and label_topk: which tokens of a cache a query is likeliest to attend to, by a few channels of keys.
#include <limits>

#include "common/label_problem.h"
#include "ops/attention.h"

namespace effops::ops {
namespace {

constexpr int64_t kMaxChannels = 1024;  // sums of products of bytes stay below 2^24, exact in float32
constexpr int64_t kMaxCount = std::numeric_limits<int32_t>::max();

// labels [B, L, G, channels] of numbers, or int32 [B, L, G, words] of so many bits a channel; channels int32 [G, r].
struct Labels {
  Arg labels, channels;
  LabelFormat format;

  Labels(const char* op, const Tensor& labels_, const Tensor& channels_, int64_t bits, const Arg& like)
      : labels(op, "labels", labels_), channels(op, "channels", channels_) {
    EFFOPS_CHECK(bits == 0 || bits == 4 || bits == 8, op, ": bits: expected 0 (numbers), 4 or 8, got ", bits);
    labels.same_device(like);
    labels.rank(4, bits == 0 ? "[B, L, G, r]" : "[B, L, G, words]");
    if (bits == 0) {
      format.dtype = labels.dtype();
      EFFOPS_CHECK(format.dtype != DType::f64, op, ": labels: expected dtype float32, bfloat16 or float16, got ",
                   labels.type_name());
    } else {
      labels.is(type_int32(), "int32");
    }
    channels.is(type_int32(), "int32").same_device(like);
    check_shape(channels, {{"G", labels.size(2)}, {"r", -1}});
    EFFOPS_CHECK(channels.size(1) <= kMaxChannels, op, ": channels: expected r up to ", kMaxChannels, ", got shape ",
                 channels.shape());
    format.bits = static_cast<int>(bits);
    format.channels = channels.size(1);
    EFFOPS_CHECK(labels.size(3) == format.items(), op, ": labels: expected ", format.items(), " ",
                 bits == 0 ? "channels" : "words", " a token (r = ", format.channels, "), got shape ", labels.shape());
  }

  Strided<int32_t> channel_ids(int64_t dim) const {
    if (const Readable<int32_t> values{channels}) {
      for (int64_t g = 0; g < channels.size(0); ++g)
        for (int64_t c = 0; c < channels.size(1); ++c)
          EFFOPS_CHECK(values.at(g, c) >= 0 && values.at(g, c) < dim, channels.op,
                       ": channels: expected values in [0, ", dim, ") (D), got ", values.at(g, c), " at index [", g,
                       ", ", c, "]");
    }
    return {reinterpret_cast<const int32_t*>(channels.data()), {channels.stride(0), channels.stride(1)}};
  }

  // float32 [G, r]
  Strided<float> each_channel(const char* name, const OptionalTensor& t, bool allowed) const {
    if (!t) return {};
    const Arg a(labels.op, name, *t);
    EFFOPS_CHECK(allowed, a.op, ": ", name, ": expected None for labels that are numbers, got a tensor");
    a.is(type_float32(), "float32").same_device(labels);
    check_shape(a, {{"G", channels.size(0)}, {"r", format.channels}});
    return {reinterpret_cast<const float*>(a.data()), {a.stride(0), a.stride(1)}};
  }
};

void append_labels(Tensor labels, Tensor k, Tensor slots, Tensor channels, OptionalTensor scales,
                   OptionalTensor offsets, int64_t bits) {
  const char* op = "append_labels";
  const Backend backend(op, labels);
  const Arg keys(op, "k", k);
  const Labels own(op, labels, channels, bits, keys);
  LabelAppendProblem p;
  p.format = own.format;
  p.dtype = keys.dtype();
  keys.rank(4, "[B, T, G, D]");
  check_shape(keys, {{"B", own.labels.size(0)}, {"T", -1}, {"G", own.labels.size(2)}, {"D", -1}});
  p.batch = keys.size(0);
  p.tokens = keys.size(1);
  p.heads = keys.size(2);
  p.dim = keys.size(3);
  p.capacity = own.labels.size(1);
  p.keys = view4(keys, unconst(keys.data()));
  p.labels = view4(own.labels, own.labels.mutable_data());
  p.channels = own.channel_ids(p.dim);
  p.scales = own.each_channel("scales", scales, bits != 0);
  p.offsets = own.each_channel("offsets", offsets, true);
  p.slots = token_indices(Arg(op, "slots", slots), keys, p.batch, p.tokens, -1, p.capacity);
  if (p.heads == 0 || p.format.channels == 0) return;
  backend.run(&cpu::Kernels::label_append, &DeviceLibrary::label_append, p);
}

Tensor label_topk(Tensor q, Tensor labels, Tensor channels, int64_t k, OptionalTensor scales, OptionalTensor kv_lens,
                  OptionalTensor kv_starts, int64_t num_sinks, int64_t window, bool each_head, int64_t bits) {
  const char* op = "label_topk";
  const Backend backend(op, q);
  const Arg query(op, "q", q);
  const Labels own(op, labels, channels, bits, query);
  LabelSearchProblem p;
  p.format = own.format;
  p.dtype = query.dtype();
  query.rank(4, "[B, T = 1, H, D]");
  EFFOPS_CHECK(query.size(1) == 1, op, ": q: expected shape [B, T = 1, H, D], got ", query.shape());
  p.batch = query.size(0);
  p.heads = query.size(2);
  p.dim = query.size(3);
  p.kv_heads = own.labels.size(2);
  p.capacity = own.labels.size(1);
  EFFOPS_CHECK(own.labels.size(0) == p.batch, op, ": labels: expected shape [B = ", p.batch, ", L, G, ",
               bits == 0 ? "r" : "words", "], got ", own.labels.shape());
  EFFOPS_CHECK(p.heads > 0 && p.kv_heads > 0 && p.heads % p.kv_heads == 0, op,
               ": labels: expected a number of KV heads that divides H = ", p.heads, ", got G = ", p.kv_heads);
  EFFOPS_CHECK(num_sinks >= 0, op, ": num_sinks: expected 0 or more, got ", num_sinks);
  EFFOPS_CHECK(window >= 0, op, ": window: expected 0 or more, got ", window);
  EFFOPS_CHECK(k >= num_sinks && k - num_sinks >= window && k <= kMaxCount, op, ": k: expected ",
               "num_sinks + window or more, and less than 2^31, got ", k, " beside ", num_sinks, " and ", window);
  const Values<int32_t> lens(op, "kv_lens", kv_lens, {"B", p.batch}, query);
  const Values<int32_t> starts(op, "kv_starts", kv_starts, {"B", p.batch}, query);
  check_range(op, "kv_lens", lens, 0, p.capacity, "L");
  check_range(op, "kv_starts", starts, 0, p.capacity, "L");
  p.each_head = each_head;
  p.q = view4(query, unconst(query.data()));
  p.labels = view4(own.labels, unconst(own.labels.data()));
  p.channels = own.channel_ids(p.dim);
  p.scales = own.each_channel("scales", scales, bits != 0);
  p.kv_lens = lens.get();
  p.kv_starts = starts.get();
  p.num_sinks = num_sinks;
  p.window = window;
  p.count = k;
  Tensor indices = empty({p.batch, p.lists(), k}, type_int32(), query);
  p.indices = reinterpret_cast<int32_t*>(Arg(op, "indices", indices).mutable_data());
  if (p.batch == 0 || k == 0) return indices;
  if (backend.device()) {
    Tensor memory;
    void* workspace = backend.workspace(memory, query, &DeviceLibrary::label_search_workspace, p);
    backend.launch(&DeviceLibrary::label_search, p, workspace);
  } else {
    cpu::kernels().label_search(p, torch_threads());
  }
  return indices;
}

}  // namespace

EFFOPS_ON_EVERY_BACKEND(m) {
  m.impl("append_labels", TORCH_BOX(&append_labels));
  m.impl("label_topk", TORCH_BOX(&label_topk));
}

}  // namespace effops::ops
