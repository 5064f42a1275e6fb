#include <cmath>

#include "ops/attention.h"

namespace effops::ops {

AttentionOptions::AttentionOptions(const char* op, const Arg& q, int64_t batch, int64_t heads, int64_t kv_heads,
                                   const OptionalTensor& kv_lens_, const OptionalTensor& kv_starts_, bool causal_,
                                   int64_t window_, int64_t num_sinks_, const OptionalTensor& prefix_lens_,
                                   const OptionalTensor& head_windows_, const OptionalTensor& sink_logits_,
                                   double softcap_, std::optional<double> scale_)
    : kv_lens(op, "kv_lens", kv_lens_, {"B", batch}, q),
      kv_starts(op, "kv_starts", kv_starts_, {"B", batch}, q),
      prefix_lens(op, "prefix_lens", prefix_lens_, {"B", batch}, q),
      head_windows(op, "head_windows", head_windows_, {"G", kv_heads}, q),
      sink_logits(op, "sink_logits", sink_logits_, {"H", heads}, q),
      causal(causal_),
      window(window_),
      num_sinks(num_sinks_),
      softcap(softcap_),
      scale(scale_ ? *scale_ : 1.0 / std::sqrt(static_cast<double>(q.size(q.dim - 1)))) {
  EFFOPS_CHECK(window >= 0, op, ": window: expected 0 (off) or more, got ", window);
  EFFOPS_CHECK(num_sinks >= 0, op, ": num_sinks: expected 0 or more, got ", num_sinks);
  EFFOPS_CHECK(std::isfinite(softcap) && softcap >= 0, op, ": softcap: expected 0 (off) or more, got ", softcap);
  EFFOPS_CHECK(std::isfinite(scale), op, ": scale: expected a finite number, got ", scale);
  EFFOPS_CHECK(window == 0 || !head_windows_, op,
               ": head_windows: expected window and head_windows not to be given together, got window = ", window);
  constexpr int64_t kAny = INT32_MAX;
  check_range(op, "prefix_lens", prefix_lens, 0, kAny, "largest int32");
  check_range(op, "head_windows", head_windows, 0, kAny, "largest int32");
}

void AttentionOptions::apply(AttentionProblem& p) const {
  if (kv_lens.get()) p.kv_lens = kv_lens.get();
  p.kv_starts = kv_starts.get();
  p.prefix_lens = prefix_lens.get();
  p.head_windows = head_windows.get();
  p.sink_logits = sink_logits.get();
  p.causal = causal;
  p.window = window;
  p.num_sinks = num_sinks;
  p.softcap = softcap;
  p.scale = scale;
}

void AttentionOptions::make_readable(AttentionProblem& p) const {
  p.kv_starts = kv_starts.host();
  p.prefix_lens = prefix_lens.host();
  p.head_windows = head_windows.host();
}

void check_offsets(const char* op, const char* name, const Values<int32_t>& offsets, int64_t rows,
                   std::optional<int64_t> longest, const char* longest_name) {
  const int32_t* cu = offsets.host();
  if (cu == nullptr) return;
  EFFOPS_CHECK(cu[0] == 0, op, ": ", name, ": expected offsets that begin with 0, got ", cu[0]);
  for (int64_t i = 1; i < offsets.count(); ++i) {
    const int64_t length = int64_t(cu[i]) - cu[i - 1];
    EFFOPS_CHECK(length >= 0, op, ": ", name, ": expected ascending offsets, got ", cu[i], " after ", cu[i - 1],
                 " at index ", i);
    EFFOPS_CHECK(!longest || length <= *longest, op, ": ", name, ": expected lengths up to ", longest_name, " = ",
                 *longest, ", got ", length, " at index ", i - 1);
  }
  EFFOPS_CHECK(cu[offsets.count() - 1] <= rows, op, ": ", name, ": expected offsets up to ", rows, ", got ",
               cu[offsets.count() - 1]);
}

TensorView4 view4(const Arg& a, char* data) { return {data, a.stride(0), a.stride(1), a.stride(2), a.stride(3)}; }
TensorView4 view3(const Arg& a, char* data) { return {data, 0, a.stride(0), a.stride(1), a.stride(2)}; }
RowView rows3(const Arg& a, char* data) { return {data, a.stride(0), a.stride(1), a.stride(2)}; }
RowView rows2(const Arg& a, char* data) { return {data, 0, a.stride(0), a.stride(1)}; }

}  // namespace effops::ops
