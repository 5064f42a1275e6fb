// sample and sampling_probs.
#include <torch/csrc/stable/ops.h>

#include <cmath>
#include <limits>

#include "ops/flaw_word.h"
#include "ops/sampling.h"

namespace effops::ops {
namespace {

// The problem of both ops but for what is drawn or written. logits becomes a copy where its rows have gaps.
SamplingProblem problem_of(const char* op, const char* name, Tensor& logits, double temperature, int64_t top_k,
                           double top_p, double min_p) {
  Arg a(op, name, logits);
  SamplingProblem p;
  p.dtype = a.dtype();
  EFFOPS_CHECK(a.dim >= 1 && a.size(a.dim - 1) > 0, op, ": ", name, ": expected shape [..., V] with V >= 1, got shape ",
               a.shape());
  p.size = a.size(a.dim - 1);
  EFFOPS_CHECK(p.size <= std::numeric_limits<int32_t>::max(), op, ": ", name, ": expected V below 2^31, got shape ",
               a.shape());
  EFFOPS_CHECK(std::isfinite(temperature) && temperature >= 0, op,
               ": temperature: expected a finite number of 0 or more, got ", temperature);
  EFFOPS_CHECK(top_k >= 0, op, ": top_k: expected 0 or more, got ", top_k);
  EFFOPS_CHECK(top_p > 0 && top_p <= 1, op, ": top_p: expected a number in (0, 1], got ", top_p);
  EFFOPS_CHECK(min_p >= 0 && min_p <= 1, op, ": min_p: expected a number in [0, 1], got ", min_p);
  p.temperature = temperature;
  p.top_k = top_k;
  p.top_p = top_p;
  p.min_p = min_p;
  if (!row_space(a, p.rows)) {
    logits = torch::stable::contiguous(logits);
    a = Arg(op, name, logits);
    row_space(a, p.rows);
  }
  p.x = a.data();
  return p;
}

void run(const Backend& backend, const Arg& logits, SamplingProblem& p) {
  const char *op = logits.op, *name = logits.name;
  FlawedRow flawed;
  if (backend.device()) {
    const FlawWord word(backend, logits);
    backend.launch(&DeviceLibrary::sampling, p, word.data());
    if (const std::optional<int64_t> flaw = word.read()) flawed.first = *flaw;
  } else {
    p.flawed = &flawed;
    cpu::kernels().sampling(p, torch_threads());
  }
  EFFOPS_CHECK(!flawed.any(), op, ": ", name, ": expected a number and no NaN or inf in each row, got ",
               flawed.flaw() == RowFlaw::nan        ? "NaN"
               : flawed.flaw() == RowFlaw::infinite ? "inf"
                                                    : "-inf only",
               " in row ", flawed.row());
}

Tensor sample(Tensor logits, std::optional<Tensor> uniforms, double temperature, int64_t top_k, double top_p,
              double min_p) {
  const char* op = "sample";
  const Backend backend(op, logits);
  SamplingProblem p = problem_of(op, "logits", logits, temperature, top_k, top_p, min_p);
  const Arg a(op, "logits", logits);
  const std::vector<int64_t> outer(a.sizes, a.sizes + a.dim - 1);
  EFFOPS_CHECK(uniforms || temperature == 0, op, ": uniforms: expected a tensor at temperature ", temperature,
               ", got none");
  if (uniforms) {
    const Arg u(op, "uniforms", *uniforms);
    u.is(type_of(DType::f64), "float64").same_device(a);
    EFFOPS_CHECK(outer == std::vector<int64_t>(u.sizes, u.sizes + u.dim), op,
                 ": uniforms: expected the shape of logits ", a.shape(), " without its last dimension, got shape ",
                 u.shape());
    p.uniforms = reinterpret_cast<const double*>(contiguous_data(u, *uniforms));
    const Readable<double> values{Arg(op, "uniforms", *uniforms)};
    for (int64_t row = 0; values && row < u.numel(); ++row)
      EFFOPS_CHECK(values.data()[row] >= 0 && values.data()[row] < 1, op, ": uniforms: expected values in [0, 1), got ",
                   values.data()[row], " in row ", row);
  }
  Tensor tokens = empty(outer, aoti_torch_dtype_int64(), a);
  p.tokens = reinterpret_cast<int64_t*>(Arg(op, "tokens", tokens).mutable_data());
  run(backend, a, p);
  return tokens;
}

Tensor sampling_probs(Tensor logits, double temperature, int64_t top_k, double top_p, double min_p) {
  const char* op = "sampling_probs";
  const Backend backend(op, logits);
  SamplingProblem p = problem_of(op, "logits", logits, temperature, top_k, top_p, min_p);
  const Arg a(op, "logits", logits);
  Tensor probs = empty(with_last(a, p.size), type_of(p.dtype == DType::f64 ? DType::f64 : DType::f32), a);
  p.probs = Arg(op, "probs", probs).mutable_data();
  run(backend, a, p);
  return probs;
}

}  // namespace

Tensor greedy_tokens(const Backend& backend, const char* op, const char* name, Tensor logits) {
  SamplingProblem p = problem_of(op, name, logits, 0, 0, 1, 0);
  const Arg a(op, name, logits);
  Tensor tokens = empty(std::vector<int64_t>(a.sizes, a.sizes + a.dim - 1), type_int64(), a);
  p.tokens = reinterpret_cast<int64_t*>(Arg(op, "tokens", tokens).mutable_data());
  run(backend, a, p);
  return tokens;
}

EFFOPS_ON_EVERY_BACKEND(m) {
  m.impl("sample", TORCH_BOX(&sample));
  m.impl("sampling_probs", TORCH_BOX(&sampling_probs));
}

}  // namespace effops::ops
