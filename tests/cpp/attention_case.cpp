#include "attention_case.h"

#include <algorithm>
#include <cmath>
#include <sstream>

namespace effops::test {
namespace {

std::string text_of(const std::vector<int32_t>& values) {
  std::string s = "{";
  for (int32_t v : values) s += (s.size() > 1 ? "," : "") + std::to_string(v);
  return s + "}";
}

std::vector<float> random_logits(int64_t count, Random& random) {
  std::vector<float> values(count);
  for (float& v : values) v = static_cast<float>(random.value());
  return values;
}

}  // namespace

std::string AttentionCase::text() const {
  std::ostringstream o;
  o << "B " << batch << " T " << q_len << " L " << capacity << " H " << heads << " G " << kv_heads << " D " << head_dim
    << " Dv " << v_dim << " lens " << text_of(lens) << " starts " << text_of(starts) << " prefixes "
    << text_of(prefixes) << " head_windows " << text_of(head_windows) << " cu_q " << text_of(cu_q) << " cu_k "
    << text_of(cu_k) << " causal " << causal << " window " << window << " sinks " << sinks << " sink_logits "
    << sink_logits << " softcap " << softcap << " page " << page << " tree " << tree << " layouts " << int(q) << int(kv)
    << int(out);
  return o.str();
}

AttentionCase random_attention_case(Random& random) {
  AttentionCase c;
  c.batch = random.between(1, 3);
  c.q_len = random.pick<int64_t>({0, 1, 1, 2, 3, 4, 7, 17, 33});
  c.capacity = random.pick<int64_t>({0, 1, 5, 63, 64, 65, 130, 200});
  c.kv_heads = random.between(1, 3);
  c.heads = c.kv_heads * random.pick<int64_t>({1, 2, 3, 5, 8});
  c.head_dim = random.pick<int64_t>({1, 7, 16, 31, 33, 64, 70});
  c.v_dim = random.pick<int64_t>({1, 8, 15, 32, 40, 65});
  auto some = [&](int64_t count, int64_t low, int64_t high) {
    std::vector<int32_t> values;
    if (random.between(0, 1)) return values;
    for (int64_t i = 0; i < count; ++i) values.push_back(static_cast<int32_t>(random.between(low, high)));
    return values;
  };
  if (random.between(0, 4) == 0) {
    for (auto [cu, rows] : {std::pair(&c.cu_q, &c.q_len), std::pair(&c.cu_k, &c.capacity)}) {
      cu->push_back(0);
      for (int64_t b = 0; b < c.batch; ++b) cu->push_back(cu->back() + static_cast<int32_t>(random.between(0, *rows)));
      *rows = cu->back() + random.between(0, 2);
    }
  } else {
    c.lens = some(c.batch, 0, c.capacity);
  }
  c.starts = some(c.batch, 0, std::min<int64_t>(c.capacity, 70));
  c.prefixes = some(c.batch, 0, c.capacity + 3);
  c.causal = random.between(0, 2) != 0;
  if (random.between(0, 1)) {
    c.window = random.pick<int64_t>({0, 1, 3, 64, 100});
  } else {
    c.head_windows = some(c.kv_heads, 0, 70);
  }
  c.sinks = random.pick<int64_t>({0, 0, 1, 4, 66});
  c.sink_logits = random.between(0, 2) == 0;
  c.softcap = random.pick<double>({0, 0, 5});
  c.q = random.pick({Layout::contiguous, Layout::swapped, Layout::gapped, Layout::strided});
  c.kv = random.pick({Layout::contiguous, Layout::swapped, Layout::gapped, Layout::strided});
  c.out = random.pick({Layout::contiguous, Layout::swapped, Layout::gapped, Layout::strided});
  return c;
}

AttentionData::AttentionData(const AttentionCase& c, DType dtype, uint32_t seed)
    : case_(c),
      lens_(c.lens),
      starts_(c.starts),
      prefixes_(c.prefixes),
      head_windows_(c.head_windows),
      cu_q_(c.cu_q),
      cu_k_(c.cu_k) {
  Random random(seed);
  const bool ragged = !c.cu_q.empty();
  const int64_t batch = ragged ? 1 : c.batch;
  q = Tensor(dtype, {batch, c.q_len, c.heads, c.head_dim}, c.q);
  const int64_t entries = c.page ? (c.capacity + c.page - 1) / c.page : 0;
  if (c.page) {  // pages lie in reverse order, every other one unused
    std::vector<int32_t> table;
    for (int64_t i = 0; i < batch * entries; ++i) table.push_back(static_cast<int32_t>(2 * (batch * entries - i) - 1));
    table_ = List<int32_t>(table);
  }
  const int64_t k_rows = c.page ? 2 * batch * entries : batch, k_tokens = c.page ? c.page : c.capacity;
  k = Tensor(dtype, {k_rows, k_tokens, c.kv_heads, c.head_dim}, c.kv);
  v = Tensor(dtype, {k_rows, k_tokens, c.kv_heads, c.v_dim}, c.kv);
  const int64_t words = (c.q_len + 63) / 64;
  if (c.tree) {
    std::vector<uint64_t> bits;
    for (int64_t i = 0; i < batch * c.q_len * words; ++i)
      bits.push_back(uint64_t(random.between(0, 0x7fffffff)) << 33 ^ uint64_t(random.between(0, 0x7fffffff)) << 11);
    ancestors_ = List<uint64_t>(bits);
    std::vector<int32_t> depths;
    for (int64_t i = 0; i < batch * c.q_len; ++i) depths.push_back(static_cast<int32_t>(random.between(-1, c.q_len)));
    depths_ = List<int32_t>(depths);
  }
  out = Tensor(dtype, {batch, c.q_len, c.heads, c.v_dim}, c.out);
  lse = Tensor(compute_type(dtype), {batch, c.q_len, c.heads, 1}, c.out);
  if (c.sink_logits) sink_logits_ = List<float>(random_logits(c.heads, random));

  AttentionProblem& p = problem;
  p.dtype = dtype;
  p.batch = c.batch;
  p.q_len = ragged ? 0 : c.q_len;
  p.kv_capacity = ragged ? 0 : c.capacity;
  p.heads = c.heads;
  p.kv_heads = c.kv_heads;
  p.head_dim = c.head_dim;
  p.v_dim = c.v_dim;
  p.q = q.view();
  p.k = k.view();
  p.v = v.view();
  p.out = out.view();
  p.lse = lse.rows();
  p.cu_q = cu_q_.get();
  p.cu_k = cu_k_.get();
  p.kv_lens = lens_.get();
  p.kv_starts = starts_.get();
  p.prefix_lens = prefixes_.get();
  p.head_windows = head_windows_.get();
  p.sink_logits = sink_logits_.get();
  p.scale = 1 / std::sqrt(double(c.head_dim));
  p.softcap = c.softcap;
  p.window = c.window;
  p.num_sinks = c.sinks;
  p.causal = c.causal;
  if (c.page) p.pages = {table_.get(), entries, 0, 1, c.page};
  if (c.tree) p.tree = {ancestors_.get(), depths_.get(), c.q_len, words, c.q_len * words, c.q_len};

  for (int64_t s = 0; s < c.batch; ++s) {  // only what the op may read becomes a number
    const int64_t b = ragged ? 0 : s;
    const int64_t first_q = ragged ? c.cu_q[s] : 0, end_q = ragged ? c.cu_q[s + 1] : c.q_len;
    const int64_t first_k = ragged ? c.cu_k[s] : 0;
    const int64_t len = ragged ? c.cu_k[s + 1] - c.cu_k[s] : c.lens.empty() ? c.capacity : c.lens[s];
    for (int64_t t = first_q; t < end_q; ++t)
      for (int64_t h = 0; h < c.heads; ++h)
        for (int64_t d = 0; d < c.head_dim; ++d) q.set(b, t, h, d, random.value());
    for (int64_t j = first_k + (c.starts.empty() ? 0 : c.starts[s]); j < first_k + len; ++j)
      for (int64_t g = 0; g < c.kv_heads; ++g) {
        const Place at = place(b, j);
        for (int64_t d = 0; d < c.head_dim; ++d) k.set(at.b, at.j, g, d, random.value());
        for (int64_t d = 0; d < c.v_dim; ++d) v.set(at.b, at.j, g, d, random.value());
      }
  }
  for (Tensor* t : {&q, &k, &v}) t->freeze();
}

template <class F>
void AttentionData::for_each_row(F&& body) const {
  const bool ragged = !case_.cu_q.empty();
  for (int64_t s = 0; s < case_.batch; ++s) {
    Row row{};
    row.sequence = s;
    row.b = ragged ? 0 : s;
    row.first_key = ragged ? case_.cu_k[s] : 0;
    row.kv_len = ragged ? case_.cu_k[s + 1] - case_.cu_k[s] : case_.lens.empty() ? case_.capacity : case_.lens[s];
    row.kv_start = case_.starts.empty() ? 0 : case_.starts[s];
    const int64_t first = ragged ? case_.cu_q[s] : 0, end = ragged ? case_.cu_q[s + 1] : case_.q_len;
    for (row.t = first; row.t < end; ++row.t)
      for (row.h = 0; row.h < case_.heads; ++row.h) {
        const int64_t ahead = case_.tree ? problem.tree.depths[s * case_.q_len + row.t] : row.t - first;
        row.position = row.kv_len - (end - first) + ahead;
        body(row);
      }
  }
}

// Positions, window, sinks and prefix count from kv_start; j is a key of the sequence.
bool AttentionData::allowed(const Row& row, int64_t j) const {
  const int64_t tree_key = case_.tree ? j - (row.kv_len - case_.q_len) : -1;
  if (j < row.kv_start) return false;
  int64_t key = j - row.kv_start;
  const int64_t position = row.position - row.kv_start;
  if (tree_key >= 0) {
    const Tree& t = problem.tree;
    const uint64_t word = t.ancestors[(row.sequence * case_.q_len + row.t) * t.words + tree_key / 64];
    if (!(word >> (tree_key % 64) & 1)) return false;
    key = row.kv_len - case_.q_len + t.depths[row.sequence * case_.q_len + tree_key] - row.kv_start;
  }
  const int64_t prefix = case_.prefixes.empty() ? 0 : case_.prefixes[row.sequence];
  if (case_.causal && key > position && key >= prefix) return false;
  const int64_t head = row.h / (case_.heads / case_.kv_heads);
  const int64_t window = case_.head_windows.empty() ? case_.window : case_.head_windows[head];
  return window == 0 || key > position - window || key < case_.sinks;
}

AttentionData::Place AttentionData::place(int64_t b, int64_t j) const {
  if (!case_.page) return {b, j};
  return {problem.pages.data[b * problem.pages.batch + j / case_.page], j % case_.page};
}

double AttentionData::product(const Row& row, int64_t j) const {
  double sum = 0;
  const int64_t g = row.h / (case_.heads / case_.kv_heads);
  const Place at = place(row.b, row.first_key + j);
  for (int64_t d = 0; d < case_.head_dim; ++d) sum += q.get(row.b, row.t, row.h, d) * k.get(at.b, at.j, g, d);
  return sum;
}

double AttentionData::score(double product) const {
  const double s = product * problem.scale, cap = case_.softcap;
  return cap == 0 ? s : cap * std::tanh(s / cap);
}

AttentionReference AttentionData::forward() const {
  AttentionReference r;
  r.out.assign(q.size(0) * q.size(1) * case_.heads * case_.v_dim, 0);
  r.lse.assign(q.size(0) * q.size(1) * case_.heads, -INFINITY);
  for_each_row([&](const Row& row) {
    std::vector<double> scores(row.kv_len, -INFINITY);
    double top = case_.sink_logits ? double(problem.sink_logits[row.h]) : -INFINITY;
    for (int64_t j = 0; j < row.kv_len; ++j) {
      if (allowed(row, j)) scores[j] = score(product(row, j));
      top = std::max(top, scores[j]);
    }
    if (top == -INFINITY) return;
    const int64_t at = (row.b * q.size(1) + row.t) * case_.heads + row.h, g = row.h / (case_.heads / case_.kv_heads);
    double total = case_.sink_logits ? std::exp(problem.sink_logits[row.h] - top) : 0;
    for (double s : scores) total += std::exp(s - top);
    for (int64_t j = 0; j < row.kv_len; ++j) {
      if (scores[j] == -INFINITY) continue;  // also 0 * NaN
      const double weight = std::exp(scores[j] - top) / total;
      const Place key = place(row.b, row.first_key + j);
      for (int64_t d = 0; d < case_.v_dim; ++d) r.out[at * case_.v_dim + d] += weight * v.get(key.b, key.j, g, d);
    }
    r.lse[at] = top + std::log(total);
  });
  return r;
}

std::vector<double> AttentionData::mass() const {
  std::vector<double> sums(case_.batch * case_.capacity * case_.kv_heads);
  for_each_row([&](const Row& row) {
    const double lse_here = lse.get(row.b, row.t, row.h, 0);
    if (lse_here == -INFINITY) return;
    const int64_t g = row.h / (case_.heads / case_.kv_heads);
    for (int64_t j = 0; j < row.kv_len; ++j)
      if (allowed(row, j))
        sums[(row.b * case_.capacity + j) * case_.kv_heads + g] += std::exp(score(product(row, j)) - lse_here);
  });
  return sums;
}

void AttentionData::backward(const Tensor& d_out, const Tensor& d_lse, AttentionReference& r) const {
  const int64_t heads = case_.heads, groups = case_.kv_heads, dim = case_.head_dim, v_dim = case_.v_dim;
  r.dq.assign(q.size(0) * q.size(1) * heads * dim, 0);
  r.dk.assign(k.size(0) * k.size(1) * groups * dim, 0);
  r.dv.assign(k.size(0) * k.size(1) * groups * v_dim, 0);
  r.dsink.assign(case_.batch * heads, 0);
  for_each_row([&](const Row& row) {
    const double lse_here = lse.get(row.b, row.t, row.h, 0);
    if (lse_here == -INFINITY) return;
    const int64_t g = row.h / (heads / groups);
    double delta = d_lse.bytes() > 0 ? -d_lse.get(row.b, row.t, row.h, 0) : 0;
    for (int64_t d = 0; d < v_dim; ++d) delta += d_out.get(row.b, row.t, row.h, d) * out.get(row.b, row.t, row.h, d);
    if (case_.sink_logits)
      r.dsink[row.sequence * heads + row.h] -= std::exp(problem.sink_logits[row.h] - lse_here) * delta;
    for (int64_t j = 0; j < row.kv_len; ++j) {
      if (!allowed(row, j)) continue;
      const double dot = product(row, j), s = score(dot), weight = std::exp(s - lse_here);
      const int64_t key = (row.b * k.size(1) + row.first_key + j) * groups + g;
      double d_weight = 0;
      for (int64_t d = 0; d < v_dim; ++d) {
        const double upstream = d_out.get(row.b, row.t, row.h, d);
        d_weight += upstream * v.get(row.b, row.first_key + j, g, d);
        r.dv[key * v_dim + d] += weight * upstream;
      }
      const double slope = case_.softcap == 0 ? 1 : 1 - (s / case_.softcap) * (s / case_.softcap);
      const double d_dot = weight * (d_weight - delta) * slope * problem.scale;
      for (int64_t d = 0; d < dim; ++d) {
        r.dq[((row.b * q.size(1) + row.t) * heads + row.h) * dim + d] += d_dot * k.get(row.b, row.first_key + j, g, d);
        r.dk[key * dim + d] += d_dot * q.get(row.b, row.t, row.h, d);
      }
    }
  });
  for (const auto* gradient : {&r.dq, &r.dk, &r.dv, &r.dsink})
    for (double x : *gradient) r.largest_gradient = std::max(r.largest_gradient, std::abs(x));
}

}  // namespace effops::test
