#include "pim/module.h"

#include <pybind11/stl.h>

#include <stdexcept>

#include "pim/serve.h"

namespace py = pybind11;

namespace effops::pim {
namespace {

// Reads the numbers of one section; python/effops/pim has checked them.
class Section {
 public:
  Section(const py::dict& all, const char* name) {
    if (all.contains(name)) values_ = all[name].cast<py::dict>();
  }
  template <class T>
  Section& operator()(const char* key, T& field) {
    if (values_.contains(key)) field = values_[key].cast<T>();
    return *this;
  }
  std::string word(const char* key) {
    std::string w;
    (*this)(key, w);
    return w;
  }

 private:
  py::dict values_;
};

Device device_from(const py::dict& d) {
  Device v;
  {
    Section s(d, "memory");
    Memory& m = v.memory;
    s("clock_ghz", m.clock_ghz)("channels", m.channels)("ranks", m.ranks)("bank_groups", m.bank_groups);
    s("banks_per_group", m.banks_per_group)("rows", m.rows)("row_bytes", m.row_bytes)("access_bytes", m.access_bytes);
    s("command_buses", m.command_buses)("flat_gb_per_s", m.flat_gb_per_s)("flat_gb", m.flat_gb);
  }
  {
    Section s(d, "timing");
    Timing& t = v.timing;
    s("tRCD", t.tRCD)("tRP", t.tRP)("tRAS", t.tRAS)("tCL", t.tCL)("tCWL", t.tCWL)("burst", t.burst);
    s("tCCD_S", t.tCCD_S)("tCCD_L", t.tCCD_L)("tRRD_S", t.tRRD_S)("tRRD_L", t.tRRD_L)("tFAW", t.tFAW);
    s("tWR", t.tWR)("tWTR_S", t.tWTR_S)("tWTR_L", t.tWTR_L)("tRTP", t.tRTP)("tRTRS", t.tRTRS);
    s("tREFI", t.tREFI)("tRFC", t.tRFC);
  }
  {
    Section s(d, "pim");
    Pim& p = v.pim;
    const std::string kind = s.word("kind");
    p.kind = kind == "banks" ? PimKind::banks : kind == "near" ? PimKind::near : PimKind::none;
    s("row_buffers", p.row_buffers)("comp_bytes", p.comp_bytes)("comp_interval", p.comp_interval);
    s("least_comps", p.least_comps)("banks_per_activation", p.banks_per_activation)("gwrite_cycles", p.gwrite_cycles);
    s("result_bytes", p.result_bytes)("composite", p.composite)("window_shared", p.window_shared);
    s("banks_per_access", p.banks_per_access)("activations_per_access", p.activations_per_access);
    s("peak_tflops", p.peak_tflops);
  }
  {
    Section s(d, "processor");
    Processor& p = v.processor;
    p.kind = s.word("kind") == "systolic" ? ProcessorKind::systolic : ProcessorKind::roofline;
    s("clock_ghz", p.clock_ghz)("arrays", p.arrays)("array_rows", p.array_rows)("array_columns", p.array_columns);
    s("vector_units", p.vector_units)("vector_width", p.vector_width)("peak_tflops", p.peak_tflops);
    s("launch_us", p.launch_us)("kernels_per_request", p.kernels_per_request);
  }
  {
    Section s(d, "link");
    Link& l = v.link;
    s("gb_per_s", l.gb_per_s)("latency_us", l.latency_us);
    s("node_gb_per_s", l.node_gb_per_s)("node_latency_us", l.node_latency_us);
  }
  {
    Section s(d, "energy");
    Energy& e = v.energy;
    s("activate", e.activate)("read", e.read)("write", e.write)("refresh", e.refresh)("gwrite", e.gwrite);
    s("comp", e.comp)("result", e.result)("near_read", e.near_read)("background_mw", e.background_mw);
    s("extra_row_buffer_mw", e.extra_row_buffer_mw)("flop", e.flop)("link_byte", e.link_byte);
  }
  return v;
}

Model model_from(const py::dict& d) {
  Model m;
  py::dict all;
  all["model"] = d;
  Section s(all, "model");
  s("layers", m.layers)("hidden", m.hidden)("heads", m.heads)("kv_heads", m.kv_heads)("head_dim", m.head_dim);
  s("intermediate", m.intermediate)("vocab", m.vocab)("ffn_matrices", m.ffn_matrices)("experts", m.experts);
  s("top_k", m.top_k)("expert_period", m.expert_period)("value_bytes", m.value_bytes);
  return m;
}

Scheduler scheduler_from(const std::string& name) {
  static const std::pair<const char*, Scheduler> all[] = {
      {"processor", Scheduler::processor},        {"blocked", Scheduler::blocked}, {"serial", Scheduler::serial},
      {"interleaved", Scheduler::interleaved},    {"neupims", Scheduler::neupims}, {"duplex", Scheduler::duplex},
      {"co_processing", Scheduler::co_processing}};
  for (const auto& [word, value] : all)
    if (name == word) return value;
  throw std::invalid_argument("scheduler: got " + name);
}

py::dict to_dict(const StageReport& r) {
  py::dict d, parts;
  for (int i = 0; i < kParts; ++i) parts[name_of(static_cast<Part>(i))] = r.part_ns[i];
  d["ns"] = r.ns, d["part_ns"] = parts;
  d["processor_flops"] = r.processor_flops, d["pim_flops"] = r.pim_flops;
  d["external_bytes"] = r.external_bytes, d["pim_bytes"] = r.pim_bytes, d["pim_busy_ns"] = r.pim_busy_ns;
  d["memory_pj"] = r.memory_pj, d["pim_pj"] = r.pim_pj, d["compute_pj"] = r.compute_pj;
  d["link_pj"] = r.link_pj, d["background_pj"] = r.background_pj;
  return d;
}

py::dict to_dict(const ServeReport& r) {
  py::dict d;
  d["sum"] = to_dict(r.sum);
  d["clock_ns"] = r.clock_ns, d["stages"] = r.stages, d["mixed_stages"] = r.mixed_stages, d["tokens"] = r.tokens;
  d["finished"] = r.finished, d["refused"] = r.refused, d["batch_ns"] = r.batch_ns;
  d["gap_ns"] = r.gap_ns, d["gap_count"] = r.gap_count;
  d["first_token_ns"] = r.first_token_ns, d["end_to_end_ns"] = r.end_to_end_ns, d["in_batch_ns"] = r.in_batch_ns;
  return d;
}

// The steps of the units for one request's attention in a channel.
std::vector<GemvStep> attention_steps(System& system, int64_t len) {
  std::vector<GemvStep> steps;
  add_logits(system.device(), system.shape(), len, &steps);
  add_context(system.device(), system.shape(), len, &steps);
  return steps;
}

py::dict channel(const py::dict& device, const std::vector<std::tuple<int64_t, bool>>& transfers,
                 const std::vector<std::tuple<bool, int64_t, int64_t>>& gemv, int64_t near_accesses, bool refresh,
                 bool with_trace) {
  ChannelWork w;
  for (const auto& [accesses, write] : transfers) w.transfers.push_back({accesses, write});
  for (const auto& [gwrite, sums, comps] : gemv) w.gemv.push_back({gwrite, sums, comps});
  w.near_accesses = near_accesses;
  w.refresh = refresh;
  std::vector<Command> trace;
  const Device d = device_from(device);
  const ChannelReport r = simulate_channel(d, w, with_trace ? &trace : nullptr);
  py::dict counts, out;
  for (int i = 0; i < kOps; ++i) counts[name_of(static_cast<Op>(i))] = r.counts[i];
  out["cycles"] = r.cycles, out["transfer_cycles"] = r.transfer_cycles, out["gemv_cycles"] = r.gemv_cycles;
  out["near_cycles"] = r.near_cycles, out["data_bus_cycles"] = r.data_bus_cycles, out["comp_cycles"] = r.comp_cycles;
  out["counts"] = counts, out["pj"] = energy_pj(d, r);
  py::list commands;
  for (const Command& c : trace)
    commands.append(py::make_tuple(c.cycle, name_of(c.op), c.rank, c.bank, c.row, c.count));
  out["trace"] = commands;
  return out;
}

}  // namespace

void add_to(py::module_& host) {
  py::module_ m = host.def_submodule("pim", "Timing and energy of processing in memory");
  m.def("simulate_channel", &channel, py::arg("device"), py::arg("transfers"), py::arg("gemv"),
        py::arg("near_accesses"), py::arg("refresh"), py::arg("trace"));
  // With the bytes that each request takes and each channel still has: channels, loads, bytes that are left.
  m.def(
      "pack_min_load",
      [](const std::vector<int64_t>& costs, std::vector<int64_t> loads, std::vector<double> bytes,
         std::vector<double> free) {
        Room room{std::move(bytes), std::move(free)};
        const std::vector<int64_t> to = pack_min_load(costs, &loads, room.free.empty() ? nullptr : &room);
        return py::make_tuple(to, loads, room.free);
      },
      py::arg("costs"), py::arg("loads"), py::arg("bytes") = std::vector<double>{},
      py::arg("free") = std::vector<double>{});
  m.def(
      "pack_round_robin",
      [](int64_t requests, int64_t channels, int64_t first, std::vector<double> bytes, std::vector<double> free) {
        Room room{std::move(bytes), std::move(free)};
        const std::vector<int64_t> to =
            pack_round_robin(requests, channels, first, room.free.empty() ? nullptr : &room);
        return py::make_tuple(to, room.free);
      },
      py::arg("requests"), py::arg("channels"), py::arg("first"), py::arg("bytes") = std::vector<double>{},
      py::arg("free") = std::vector<double>{});
  m.def("halve_batch", &halve_batch);
  m.def("halve_by_length", &halve_by_length);
  m.def(
      "split_experts",
      [](const std::vector<int64_t>& tokens, const std::vector<double>& processor, const std::vector<double>& near,
         int64_t sections, const std::vector<double>& near_beside, double processor_stretch) {
        const ExpertSplit s = split_experts(tokens, processor, near, sections, near_beside, processor_stretch);
        return py::make_tuple(s.ns, s.processor_ns, s.near_ns, s.near);
      },
      py::arg("tokens"), py::arg("processor"), py::arg("near"), py::arg("sections"),
      py::arg("near_beside") = std::vector<double>{}, py::arg("processor_stretch") = 1.0);
  py::class_<System>(m, "System")
      .def(py::init([](const py::dict& device, const py::dict& model, int64_t tensor, int64_t pipeline, int64_t data,
                       bool split_experts, const std::string& scheduler) {
        return System(device_from(device), model_from(model), {tensor, pipeline, data, split_experts},
                      scheduler_from(scheduler));
      }))
      .def("step",
           [](System& s, std::vector<int64_t> decode, std::vector<int64_t> channel, std::vector<int64_t> prefill,
              uint64_t seed) {
             return to_dict(s.step({std::move(decode), std::move(channel), std::move(prefill), {}, {}}, seed));
           })
      .def("attention_cycles", &System::attention_cycles)
      .def("estimate_attention", [](System& s, int64_t len) { return estimate_attention(s.device(), s.shape(), len); })
      .def(
          "fits",
          [](const System& s, std::vector<int64_t> decode, std::vector<int64_t> channel, std::vector<int64_t> prefill) {
            return s.fits({std::move(decode), std::move(channel), std::move(prefill), {}, {}});
          })
      .def("kv_bytes", &System::kv_bytes)
      .def("weight_bytes", &System::weight_bytes)
      .def("room_bytes", &System::room_bytes)
      .def("capacity", [](const System& s) { return s.device().capacity(); })
      .def("sections", &System::sections)
      .def("units_ns", &System::units_ns)
      .def("overlapped", &System::overlapped)
      .def("processor_ns", &System::processor_ns)
      .def("attention_steps",
           [](System& s, int64_t len) {
             py::list steps;
             for (const GemvStep& g : attention_steps(s, len))
               steps.append(py::make_tuple(g.gwrite, g.sums, g.comps_per_sum));
             return steps;
           })
      .def("rates", [](System& s) {
        const Rates& r = s.rates();
        py::dict d;
        d["read_gb_per_s"] = 1 / r.read_ns(1), d["write_gb_per_s"] = 1 / r.write_ns(1);
        d["near_gb_per_s"] = r.near_ns(1) > 0 ? 1 / r.near_ns(1) : 0.0;
        d["units_stretch"] = r.units_stretch(), d["transfer_stretch"] = r.transfer_stretch();
        return d;
      });
  py::class_<Server>(m, "Server")
      .def(py::init([](System& system, const std::vector<double>& arrival, const std::vector<int64_t>& prompt,
                       const std::vector<int64_t>& output, const std::vector<int64_t>& generated, int64_t max_batch,
                       bool prefill, bool balanced, bool limit_capacity, uint64_t seed) {
             std::vector<Request> requests(arrival.size());
             for (size_t i = 0; i < arrival.size(); ++i)
               requests[i] = {arrival[i], prompt.at(i), output.at(i), generated.at(i)};
             return Server(&system, std::move(requests), {max_batch, prefill, balanced, limit_capacity, seed});
           }),
           py::keep_alive<1, 2>())
      .def("advance", &Server::advance)
      .def("finished", [](const Server& s) { return s.report().finished; })
      .def("report", [](const Server& s) { return to_dict(s.report()); });
}

}  // namespace effops::pim
