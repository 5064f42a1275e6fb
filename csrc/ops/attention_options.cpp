#include <bit>
#include <cmath>
#include <cstring>

#include "common/attention_plan.h"
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

void check_offsets(const char* op, const char* name, const Values<int32_t>& cu, int64_t rows,
                   std::optional<int64_t> longest, const char* longest_name) {
  EFFOPS_CHECK(cu.get()[0] == 0, op, ": ", name, ": expected offsets that begin with 0, got ", cu.get()[0]);
  for (int64_t i = 1; i < cu.count(); ++i) {
    const int64_t length = int64_t(cu.get()[i]) - cu.get()[i - 1];
    EFFOPS_CHECK(length >= 0, op, ": ", name, ": expected ascending offsets, got ", cu.get()[i], " after ",
                 cu.get()[i - 1], " at index ", i);
    EFFOPS_CHECK(!longest || length <= *longest, op, ": ", name, ": expected lengths up to ", longest_name, " = ",
                 *longest, ", got ", length, " at index ", i - 1);
  }
  EFFOPS_CHECK(cu.get()[cu.count() - 1] <= rows, op, ": ", name, ": expected offsets up to ", rows, ", got ",
               cu.get()[cu.count() - 1]);
}

int32_t lse_type(DType t) { return t == DType::f64 ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32(); }

void clear_unowned(const Arg& out, const Arg& lse, int64_t from, DType dtype) {
  const int64_t rows = out.size(0) - from;
  if (rows <= 0) return;
  std::memset(out.mutable_data() + from * out.stride(0) * size_of(dtype), 0, rows * out.stride(0) * size_of(dtype));
  const int64_t begin = from * lse.stride(0), end = out.size(0) * lse.stride(0);
  for (int64_t i = begin; i < end; ++i) {
    if (dtype == DType::f64) {
      reinterpret_cast<double*>(lse.mutable_data())[i] = -INFINITY;
    } else {
      reinterpret_cast<float*>(lse.mutable_data())[i] = -INFINITY;
    }
  }
}

TreeMask::TreeMask(const Arg& q, const Tensor& ancestors, const OptionalTensor& depths, const AttentionProblem& p)
    : ancestors_(ancestors) {
  const char* op = q.op;
  const Arg a(op, "ancestors", ancestors);
  a.is(aoti_torch_dtype_int64(), "int64").same_device(q);
  a.rank(3, "[B or 1, T, ceil(T / 64)]");
  const int64_t tokens = tokens_ = p.cu_q ? a.size(1) : p.q_len;
  auto rows_of = [&](const Arg& x) {
    EFFOPS_CHECK(x.size(0) == p.batch || x.size(0) == 1, op, ": ", x.name, ": expected B = ", p.batch,
                 " or 1 in the first dimension, got shape ", x.shape());
    return x.size(0) == 1 ? 0 : 1;
  };
  tree_.words = (tokens + 63) / 64;
  check_shape(a, {{"B or 1", -1}, {"T", tokens}, {"ceil(T / 64)", tree_.words}});
  tree_.ancestors_batch = rows_of(a) * tokens * tree_.words;
  tree_.ancestors = reinterpret_cast<const uint64_t*>(contiguous_data(a, ancestors_));
  if (tree_.ancestors == nullptr) tree_.ancestors = reinterpret_cast<const uint64_t*>(&tree_);  // no row: never read
  if (depths) {
    const Arg d(op, "depths", *depths);
    d.is(type_int32(), "int32").same_device(q);
    check_shape(d, {{"B or 1", -1}, {"T", tokens}});
    tree_.depths_batch = rows_of(d) * tokens;
    depths_ = *depths;
    tree_.depths = reinterpret_cast<const int32_t*>(contiguous_data(d, depths_));
    return;
  }
  const int64_t rows = p.cu_q ? p.batch : a.size(0);
  counted_.resize(rows * tokens + 1);
  for (int64_t b = 0; b < rows; ++b) {
    const int64_t own = p.cu_q ? std::min<int64_t>(p.cu_q[b + 1] - p.cu_q[b], tokens) : tokens;
    for (int64_t i = 0; i < own; ++i) {
      const uint64_t* bits = tree_.ancestors + b * tree_.ancestors_batch + i * tree_.words;
      int32_t count = -1;
      for (int64_t w = 0; w * 64 < own; ++w)
        count += std::popcount(own - w * 64 < 64 ? bits[w] & ((uint64_t(1) << (own - w * 64)) - 1) : bits[w]);
      counted_[b * tokens + i] = count;
    }
  }
  tree_.depths = counted_.data();
  tree_.depths_batch = rows == 1 ? 0 : tokens;
}

PageTable page_table_of(const Arg& table, const Arg& like, int64_t batch, int64_t kv_heads, int64_t page) {
  table.is(type_int32(), "int32").same_device(like);
  EFFOPS_CHECK(table.dim == 2 || table.dim == 3, table.op, ": ", table.name,
               ": expected shape [B, entries] or [B, G, entries], got ", table.shape());
  if (table.dim == 2) {
    check_shape(table, {{"B", batch}, {"entries", -1}});
  } else {
    check_shape(table, {{"B", batch}, {"G", kv_heads}, {"entries", -1}});
  }
  static const int32_t none = 0;
  const auto* data = reinterpret_cast<const int32_t*>(table.data());
  return {data ? data : &none, table.stride(0), table.dim == 3 ? table.stride(1) : 0, table.stride(table.dim - 1),
          std::max<int64_t>(page, 1)};
}

void check_pages(const char* op, const char* name, const AttentionProblem& p, int64_t count) {
  const bool a_head = p.lens_a_head || p.head_windows || p.pages.head != 0;
  for (int64_t b = 0; b < p.batch; ++b)
    for (int64_t g = 0; g < (a_head ? p.kv_heads : 1); ++g) {
      const Sequence s = sequence_of(p, b, g);
      if (s.q_len == 0) continue;
      const TileList seen = TileList::of(visibility_of(p, s, g), s.positions(0, s.q_len - 1));
      for (int part = 0; part < 2; ++part) {
        if (seen.end[part] <= seen.begin[part]) continue;
        for (int64_t i = seen.begin[part] / p.pages.page; i <= (seen.end[part] - 1) / p.pages.page; ++i) {
          const int64_t page = p.pages.entry_of(b, g, i);
          EFFOPS_CHECK(page >= 0 && page < count, op, ": ", name, ": expected pages in [0, ", count, "), got ", page,
                       " at entry ", i, " of sequence ", b);
        }
      }
    }
}

TensorView4 view4(const Arg& a, char* data) { return {data, a.stride(0), a.stride(1), a.stride(2), a.stride(3)}; }
TensorView4 view3(const Arg& a, char* data) { return {data, 0, a.stride(0), a.stride(1), a.stride(2)}; }
RowView rows3(const Arg& a, char* data) { return {data, a.stride(0), a.stride(1), a.stride(2)}; }
RowView rows2(const Arg& a, char* data) { return {data, 0, a.stride(0), a.stride(1)}; }

}  // namespace effops::ops
