// The host's side of the grouped product for sm_90a, and the lists that a kernel writes for it.
#include "kernel_memory.h"
#include "moe/hopper_plan.h"

namespace effops::test {
namespace {

struct Call {
  int rows = 20, in = 16, out = 24;
  std::vector<int32_t> ends = {0, 7, 7, 12};
  Buffer<bf16> x{20 * 16}, w{4 * 16 * 24}, y{20 * 24};
  Buffer<int32_t> offsets{4};

  GroupedProblem problem(bool inputs = true) {
    offsets.fill(ends);
    GroupedProblem p;
    p.dtype = DType::bf16;
    p.rows = rows;
    p.in = p.x_row = in;
    p.out = p.y_row = out;
    p.groups = 4;
    p.offsets = offsets.get();
    p.x = x.raw();
    p.w = w.raw();
    p.w_group = in * out;
    p.w_in = inputs ? 1 : out;
    p.w_out = inputs ? in : 1;
    p.y = y.raw();
    return p;
  }
};

TEST(hopper_lists) {
  for (bool inputs : {true, false}) {
    Call c;
    const GroupedProblem p = c.problem(inputs);
    Buffer<char> workspace(device::HopperProblems::bytes(p.groups));
    const auto h = device::HopperProblems::at(workspace.get(), p.groups);
    run_within({workspace.extent("workspace", true), c.offsets.extent("offsets"), c.y.extent("y", true)}, "hopper",
               [&] { return device::write_hopper_problems(p, h, nullptr); });
    for (int g = 0; g < 4; ++g) {
      const int begin = g ? c.ends[g - 1] : 0;
      CHECK(h.shapes[3 * g] == c.ends[g] - begin && h.shapes[3 * g + 1] == 24 && h.shapes[3 * g + 2] == 16, g);
      CHECK(h.x[g] == c.x.get() + begin * 16 && h.y[g] == c.y.get() + begin * 24, g);
      CHECK(h.w[g] == c.w.get() + g * 16 * 24, g);
      CHECK(h.x_strides[g] == 16 && h.w_strides[g] == (inputs ? 16 : 24) && h.y_strides[g] == 24, g);
    }
    for (int i = 0; i < 20 * 24; ++i) CHECK((c.y.value(i) == 0) == (i >= 12 * 24), i);
  }
}

// Offsets that are none still name rows that there are.
TEST(hopper_lists_of_any_offsets) {
  Call c;
  c.ends = {INT32_MAX, -3, 30, 5};
  const GroupedProblem p = c.problem();
  Buffer<char> workspace(device::HopperProblems::bytes(p.groups));
  const auto h = device::HopperProblems::at(workspace.get(), p.groups);
  run_within({workspace.extent("workspace", true), c.offsets.extent("offsets"), c.y.extent("y", true)}, "hopper",
             [&] { return device::write_hopper_problems(p, h, nullptr); });
  for (int g = 0; g < 4; ++g) {
    const int64_t begin = (static_cast<const bf16*>(h.x[g]) - c.x.get()) / 16;
    CHECK(begin >= 0 && h.shapes[3 * g] >= 0 && begin + h.shapes[3 * g] <= 20, g, ": ", begin);
  }
}

TEST(hopper_workspace_in_pieces) {
  for (int64_t groups : {1, 7, 64, 5000}) {
    Buffer<char> workspace(device::HopperProblems::bytes(groups));
    const auto h = device::HopperProblems::at(workspace.get(), groups);
    CHECK(h.end == workspace.get() + workspace.count() && reinterpret_cast<char*>(h.shapes) == workspace.get(), groups);
    CHECK(reinterpret_cast<char*>(h.y_strides + groups) <= h.end, groups);
    CHECK(reinterpret_cast<char*>(h.x) - workspace.get() >= 12 * groups, groups);
  }
}

TEST(hopper_serves_what_tma_can_read) {
  Call c;
  const auto serves = [&](auto&& change) {
    GroupedProblem p = c.problem();
    change(p);
    return device::hopper_serves(p);
  };
  const float scale = 1;
  CHECK(serves([](auto&) {}), "plain");
  CHECK(serves([](auto& p) { p.w_in = 24, p.w_out = 1; }), "outputs are neighbours");
  CHECK(!serves([](auto& p) { p.dtype = DType::f16; }), "float16");
  CHECK(!serves([](auto& p) { p.order = p.offsets; }), "gathered rows");
  CHECK(!serves([](auto& p) { p.bias = p.x; }), "bias");
  CHECK(!serves([&](auto& p) { p.scale = &scale; }), "bytes");
  CHECK(!serves([](auto& p) { p.in_sizes = p.offsets; }), "sizes");
  CHECK(!serves([](auto& p) { p.gated = true; }), "gates");
  CHECK(!serves([](auto& p) { p.activation = Activation::silu; }), "an activation");
  CHECK(!serves([](auto& p) { p.in = 12; }), "pieces that do not divide the depth");
  CHECK(!serves([](auto& p) { p.x_row = 17; }), "rows apart");
  CHECK(!serves([](auto& p) { p.w_out = 18; }), "lines apart");
  CHECK(!serves([](auto& p) { p.y += 2; }), "an address");
  CHECK(!serves([](auto& p) { p.groups = 0; }), "no group");
  CHECK(!serves([](auto& p) { p.rows = 0; }), "no rows");
  CHECK(!device::hopper_enabled(), "not on the host");
}

}  // namespace
}  // namespace effops::test
