// Host objects for Python: what this build contains, what this processor offers, schedules as text.
// No tensor goes through here; the ops live in the library that torch loads.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>

#include "common/attention_plan.h"
#include "common/device_attention_plan.h"
#include "common/linear_problem.h"
#include "common/token_tree.h"
#include "cpu/isa.h"
#include "pim/module.h"

namespace py = pybind11;
using namespace effops;

namespace {

DType dtype_of(const std::string& name) {
  for (DType t : {DType::f32, DType::bf16, DType::f16, DType::f64})
    if (name == name_of(t)) return t;
  throw std::invalid_argument("explain: dtype: expected float32, bfloat16, float16 or float64, got " + name);
}

std::string explain(const std::string& dtype, int64_t batch, int64_t q_len, int64_t kv_len, int64_t heads,
                    int64_t kv_heads, int64_t head_dim, int64_t v_dim, bool causal, int64_t window, int64_t num_sinks,
                    const std::string& backend) {
  if (batch < 0 || q_len < 0 || kv_len < 0 || heads < 1 || kv_heads < 1 || head_dim < 1 || v_dim < 1 || window < 0 ||
      num_sinks < 0)
    throw std::invalid_argument("explain: expected sizes of 0 or more, and heads and dims of 1 or more");
  if (heads % kv_heads != 0)
    throw std::invalid_argument("explain: kv_heads: expected a divisor of heads = " + std::to_string(heads) + ", got " +
                                std::to_string(kv_heads));
  AttentionProblem p;
  p.dtype = dtype_of(dtype);
  p.batch = batch;
  p.q_len = q_len;
  p.kv_capacity = kv_len;
  p.heads = heads;
  p.kv_heads = kv_heads;
  p.head_dim = head_dim;
  p.v_dim = v_dim;
  p.causal = causal;
  p.window = window;
  p.num_sinks = num_sinks;
  if (backend != "cpu") return device::explain_attention(p, backend.c_str());
  return explain_attention(p, cpu::name_of(cpu::chosen_isa()));
}

std::string explain_packed_linear(const std::string& dtype, int64_t rows, int64_t n, int64_t k) {
  if (rows < 0 || n < 0 || k < 0) throw std::invalid_argument("explain: expected sizes of 0 or more");
  LinearProblem p;
  p.dtype = dtype_of(dtype);
  p.rows = rows;
  p.in = k;
  p.out = n;
  return explain_linear(p, cpu::name_of(cpu::chosen_isa()));
}

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.doc() = "Host objects of effops";
  m.def("cpu_isas", &cpu::supported_isas, "Instruction sets of this build that this processor supports, slowest first");
  m.def("cpu_isa", [] { return std::string(cpu::name_of(cpu::chosen_isa())); }, "The instruction set in use");
  m.def("build_info", [] {
    py::dict d;
    d["version"] = EFFOPS_VERSION;
    d["compiler"] = EFFOPS_COMPILER;
    d["build_type"] = EFFOPS_BUILD_TYPE;
    d["torch_headers"] = EFFOPS_TORCH_VERSION;
    d["cuda"] = EFFOPS_CUDA_ARCHS;
    return d;
  });
  m.def("explain_attention", &explain, py::kw_only(), py::arg("dtype"), py::arg("batch"), py::arg("q_len"),
        py::arg("kv_len"), py::arg("heads"), py::arg("kv_heads"), py::arg("head_dim"), py::arg("v_dim"),
        py::arg("causal") = false, py::arg("window") = 0, py::arg("num_sinks") = 0, py::arg("backend") = "cpu");
  m.def("explain_linear", &explain_packed_linear, py::kw_only(), py::arg("dtype"), py::arg("rows"), py::arg("n"),
        py::arg("k"));
  pim::add_to(m);
  py::class_<TokenTree>(m, "TokenTree")
      .def(py::init<std::vector<int64_t>, std::optional<std::vector<int64_t>>>())
      .def_static("from_paths", &TokenTree::from_paths)
      .def_static("chain", &TokenTree::chain)
      .def_static("full", &TokenTree::full)
      .def_static("optimal", &TokenTree::optimal)
      .def("size", &TokenTree::size)
      .def_property_readonly("parents", &TokenTree::parents)
      .def_property_readonly("ranks", &TokenTree::ranks)
      .def_property_readonly("depths", &TokenTree::depths)
      .def("max_depth", &TokenTree::max_depth)
      .def("children", &TokenTree::children)
      .def("leaves", &TokenTree::leaves)
      .def("paths", &TokenTree::paths)
      .def("ancestors", &TokenTree::ancestors)
      .def("truncated", &TokenTree::truncated)
      .def("expected", &TokenTree::expected);
}
