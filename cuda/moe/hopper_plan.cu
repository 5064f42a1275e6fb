#include "moe/hopper_plan.h"

#include <climits>

#include "moe/group_rows.h"
#include "primitives/element.h"

namespace effops::device {
namespace {

constexpr int64_t kAlignment = 256;
constexpr int kThreads = 128;

struct Params {
  GroupedProblem p;
  HopperProblems to;
};

__global__ void __launch_bounds__(kThreads) hopper_problems(const __grid_constant__ Params a) {
  const GroupedProblem& p = a.p;
  const bf16* const x = reinterpret_cast<const bf16*>(p.x);
  const bf16* const w = reinterpret_cast<const bf16*>(p.w);
  bf16* const y = reinterpret_cast<bf16*>(p.y);
  const int64_t first = int64_t(blockIdx.x) * blockDim.x + threadIdx.x, step = int64_t(gridDim.x) * blockDim.x;
  for (int64_t g = first; g < p.groups; g += step) {
    const GroupRows rows = GroupRows::of(p.offsets, p.rows, g);
    a.to.shapes[3 * g] = static_cast<int32_t>(rows.count());
    a.to.shapes[3 * g + 1] = static_cast<int32_t>(p.out);
    a.to.shapes[3 * g + 2] = static_cast<int32_t>(p.in);
    a.to.x[g] = x + rows.begin * p.x_row;
    a.to.w[g] = w + g * p.w_group;
    a.to.y[g] = y + rows.begin * p.y_row;
    a.to.x_strides[g] = p.x_row;
    a.to.w_strides[g] = p.w_in == 1 ? p.w_out : p.w_in;
    a.to.y_strides[g] = p.y_row;
  }
  constexpr int kCount = kItems16<bf16>;
  const int64_t end = clamp_to<int64_t>(p.offsets[p.groups - 1], 0, p.rows), pieces = p.out / kCount;
  for (int64_t i = end * pieces + first; i < p.rows * pieces; i += step)
    Items<bf16, kCount>{}.store(y + i / pieces * p.y_row + i % pieces * kCount);
}

constexpr int64_t piece_bytes(int64_t items, int64_t item_bytes) {
  return (items * item_bytes + kAlignment - 1) / kAlignment * kAlignment;
}

// Cuts the next piece off.
template <class T>
T* take(char*& at, int64_t count) {
  T* const piece = reinterpret_cast<T*>(at);
  at += piece_bytes(count, sizeof(T));
  return piece;
}

}  // namespace

HopperProblems HopperProblems::at(void* workspace, int64_t groups) {
  HopperProblems h;
  char* at = static_cast<char*>(workspace);
  h.shapes = take<int32_t>(at, 3 * groups);
  h.x = take<const void*>(at, groups);
  h.w = take<const void*>(at, groups);
  h.y = take<void*>(at, groups);
  h.x_strides = take<int64_t>(at, groups);
  h.w_strides = take<int64_t>(at, groups);
  h.y_strides = take<int64_t>(at, groups);
  h.end = at;
  return h;
}

int64_t HopperProblems::bytes(int64_t groups) {
  return piece_bytes(3 * groups, sizeof(int32_t)) + 3 * piece_bytes(groups, sizeof(void*)) +
         3 * piece_bytes(groups, sizeof(int64_t));
}

bool hopper_serves(const GroupedProblem& p) {
  const bool plain = p.dtype == DType::bf16 && p.order == nullptr && p.scale == nullptr && p.bias == nullptr &&
                     p.in_sizes == nullptr && p.out_sizes == nullptr && p.activation == Activation::none && !p.gated &&
                     p.layout != WeightLayout::panels;
  const bool lines = p.w_in == 1 || p.w_out == 1;
  const int64_t line = p.w_in == 1 ? p.w_out : p.w_in;
  return plain && lines && p.groups > 0 && p.rows > 0 && p.in > 0 && p.out > 0 && p.rows <= INT_MAX &&
         p.in <= INT_MAX && p.out <= INT_MAX && p.groups <= INT_MAX && in_pieces(p.x, 2, {p.x_row, p.in}) &&
         in_pieces(p.w, 2, {p.w_group, line}) && in_pieces(p.y, 2, {p.y_row, p.out});
}

int write_hopper_problems(const GroupedProblem& p, const HopperProblems& to, void* stream) {
  const int64_t items = max_of(p.groups, p.rows * (p.out / kItems16<bf16>));
  const int64_t blocks = clamp_to<int64_t>((items + kThreads - 1) / kThreads, 1, 1024);
  return launch<Params>({"hopper_problems", dim3(static_cast<unsigned>(blocks)), kThreads, 0, stream}, &hopper_problems,
                        Params{p, to});
}

#ifndef EFFOPS_CUTLASS
bool hopper_enabled() { return false; }
int64_t hopper_workspace(const GroupedProblem&) { return 0; }
int hopper_grouped(const GroupedProblem&, void*, void*) { return kUnsupported; }
#endif

}  // namespace effops::device
