#include <cstdlib>

#include "grouped_case.h"
#include "kernel_memory.h"
#include "moe/grouped.h"

namespace effops::test {

template <class T>
void check_grouped_gradient(const GroupedCase& c) {
  const int64_t rows = c.rows(), x_row = c.in + c.gap, dy_row = c.out + c.gap;
  const int groups = static_cast<int>(c.counts.size());
  Integers draw(rows + 13 * c.in + c.out);
  Buffer<T> x(rows * x_row, c.shift), dy(rows * dy_row, c.shift), dw(int64_t(groups) * c.in * c.out, c.shift);
  Buffer<int32_t> offsets(groups), in_sizes(c.sizes ? groups : 0), out_sizes(c.sizes ? groups : 0);
  GroupedGradientProblem p;
  p.dtype = dtype_of<T>;
  p.rows = rows;
  p.in = c.in;
  p.out = c.out;
  p.groups = groups;
  p.offsets = offsets.get();
  p.x = x.raw();
  p.dy = dy.raw();
  p.dw = dw.raw();
  p.x_row = x_row;
  p.dy_row = dy_row;
  p.in_sizes = in_sizes.get();
  p.out_sizes = out_sizes.get();
  const auto inputs_of = [&](int g) { return c.sizes ? in_sizes[g] : c.in; };
  const auto outputs_of = [&](int g) { return c.sizes ? out_sizes[g] : c.out; };
  int64_t row = 0;
  for (int g = 0; g < groups; ++g) {
    if (c.sizes) in_sizes[g] = draw(0, c.in), out_sizes[g] = draw(0, c.out);
    for (int i = 0; i < c.counts[g]; ++i, ++row) {
      for (int k = 0; k < inputs_of(g); ++k) x.set(row * x_row + k, c.nan && i + k == 0 ? NAN : draw(-3, 3));
      for (int f = 0; f < outputs_of(g); ++f) dy.set(row * dy_row + f, c.nan && i + f == 1 ? NAN : draw(-3, 3));
    }
    offsets[g] = static_cast<int32_t>(row);
  }
  run_within({x.extent("x"), dy.extent("dy"), dw.extent("dw", true), offsets.extent("offsets"),
              in_sizes.extent("in_sizes"), out_sizes.extent("out_sizes")},
             c.text(), [&] { return device::grouped_gradient(p, nullptr, nullptr); });
  row = 0;
  for (int g = 0; g < groups; row += c.counts[g++])
    for (int k = 0; k < c.in; ++k)
      for (int f = 0; f < c.out; ++f) {
        double sum = 0;
        for (int i = 0; i < c.counts[g] && k < inputs_of(g) && f < outputs_of(g); ++i)
          sum += x.value((row + i) * x_row + k) * dy.value((row + i) * dy_row + f);
        const double got = dw.value((int64_t(g) * c.in + k) * c.out + f);
        const bool right = std::isnan(sum) ? std::isnan(got) : got == device::widen(device::narrow<T>(float(sum)));
        CHECK(right, c.text(), ": group ", g, ", ", k, ", ", f, ": ", got, ", expected ", sum);
      }
}
template void check_grouped_gradient<float>(const GroupedCase&);
template void check_grouped_gradient<bf16>(const GroupedCase&);
template void check_grouped_gradient<f16>(const GroupedCase&);

template <class T>
void run_with_offsets(const std::vector<int32_t>& offsets, int rows) {
  constexpr int kIn = 8, kOut = 16;
  const int groups = static_cast<int>(offsets.size());
  Buffer<T> x(rows * kIn), w(int64_t(groups) * kIn * kOut), y(rows * kOut), dw(int64_t(groups) * kIn * kOut);
  Buffer<int32_t> ends(groups);
  ends.fill(offsets);
  GroupedProblem p;
  p.dtype = dtype_of<T>;
  p.rows = rows;
  p.in = p.x_row = kIn;
  p.out = p.y_row = kOut;
  p.groups = groups;
  p.w_group = kIn * kOut;
  p.w_in = kOut;
  p.w_out = 1;
  p.offsets = ends.get();
  p.x = x.raw();
  p.w = w.raw();
  p.y = y.raw();
  GroupedGradientProblem q;
  q.dtype = p.dtype;
  q.rows = rows;
  q.in = q.x_row = kIn;
  q.out = q.dy_row = kOut;
  q.groups = groups;
  q.offsets = p.offsets;
  q.x = p.x;
  q.dy = p.y;
  q.dw = dw.raw();
  setenv("EFFOPS_SIMT_THREADS", "1", 1);
  {
    const Extents allowed({x.extent("x"), w.extent("w"), y.extent("y", true), ends.extent("offsets")});
    device::grouped(p, nullptr, nullptr);
    const std::string report = simt::last_report();  // overlapping groups write the same rows
    CHECK(report.empty() || report.find("race") != std::string::npos, report);
  }
  run_within({x.extent("x"), y.extent("dy"), dw.extent("dw", true), ends.extent("offsets")}, "any offsets",
             [&] { return device::grouped_gradient(q, nullptr, nullptr); });
  unsetenv("EFFOPS_SIMT_THREADS");
}
template void run_with_offsets<float>(const std::vector<int32_t>&, int);
template void run_with_offsets<bf16>(const std::vector<int32_t>&, int);

}  // namespace effops::test
