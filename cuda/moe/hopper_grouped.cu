// The grouped product as CUTLASS's ptr-array GEMM: TMA, wgmma, one problem a group. Compiled with EFFOPS_CUTLASS
// (third_party/cutlass.cmake) for sm_90a alone; not for the host machine.
#ifdef EFFOPS_CUTLASS

#include <cstdlib>
#include <cstring>

#include "cutlass/cutlass.h"
#include "cutlass/epilogue/collective/collective_builder.hpp"
#include "cutlass/gemm/collective/collective_builder.hpp"
#include "cutlass/gemm/device/gemm_universal_adapter.h"
#include "cutlass/gemm/group_array_problem_shape.hpp"
#include "cutlass/gemm/kernel/gemm_universal.hpp"
#include "moe/hopper_plan.h"
#include "primitives/launch.h"

namespace effops::device {
namespace {

using Element = cutlass::bfloat16_t;
using Shape = cute::Shape<int, int, int>;  // rows, outputs, inputs
using Problem = cutlass::gemm::GroupProblemShape<Shape>;
using Tile = cute::Shape<cute::_128, cute::_256, cute::_64>;
using Cluster = cute::Shape<cute::_1, cute::_2, cute::_1>;  // two tiles of outputs share the rows that they read
using Row = cutlass::layout::RowMajor;
using Column = cutlass::layout::ColumnMajor;
constexpr int kPiece = 8;  // elements of 16 bytes

// Everything is named outside of templates: nvcc 13 with g++ 12 does not get through it otherwise.
namespace collective = cutlass::gemm::collective;
using Epilogue = cutlass::epilogue::collective::CollectiveBuilder<
    cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Tile, Cluster, cutlass::epilogue::collective::EpilogueTileAuto,
    float, float, void, Row*, kPiece, Element, Row*, kPiece,
    cutlass::epilogue::PtrArrayTmaWarpSpecializedCooperative>::CollectiveOp;
using Stages = collective::StageCountAutoCarveout<static_cast<int>(sizeof(Epilogue::SharedStorage))>;
using Schedule = cutlass::gemm::KernelPtrArrayTmaWarpSpecializedCooperative;
// Of weights whose inputs or outputs are neighbours.
using InputsLoop =
    collective::CollectiveBuilder<cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Element, Row*, kPiece, Element,
                                  Column*, kPiece, float, Tile, Cluster, Stages, Schedule>::CollectiveOp;
using OutputsLoop =
    collective::CollectiveBuilder<cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Element, Row*, kPiece, Element,
                                  Row*, kPiece, float, Tile, Cluster, Stages, Schedule>::CollectiveOp;
using InputsKernel = cutlass::gemm::kernel::GemmUniversal<Problem, InputsLoop, Epilogue>;
using OutputsKernel = cutlass::gemm::kernel::GemmUniversal<Problem, OutputsLoop, Epilogue>;

template <class Kernel>
struct Hopper {
  using Gemm = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;
  using XStride = typename Kernel::InternalStrideA;
  using WStride = typename Kernel::InternalStrideB;
  using YStride = typename Kernel::InternalStrideD;
  // What the device writes for these types (hopper_plan.h).
  static_assert(sizeof(Shape) == 3 * sizeof(int32_t), "three numbers");
  static_assert(sizeof(XStride) == 8 && sizeof(WStride) == 8 && sizeof(YStride) == 8, "one number of 64 bits");

  static typename Gemm::Arguments arguments(const GroupedProblem& p, const HopperProblems& h) {
    typename Gemm::Arguments a{};
    a.mode = cutlass::gemm::GemmUniversalMode::kGrouped;
    a.problem_shape = {static_cast<int>(p.groups), reinterpret_cast<Shape*>(h.shapes), nullptr};
    a.mainloop = {reinterpret_cast<const Element**>(h.x), reinterpret_cast<XStride*>(h.x_strides),
                  reinterpret_cast<const Element**>(h.w), reinterpret_cast<WStride*>(h.w_strides)};
    a.epilogue.thread.alpha = 1;
    a.epilogue.thread.beta = 0;
    a.epilogue.ptr_D = reinterpret_cast<Element**>(h.y);
    a.epilogue.dD = reinterpret_cast<YStride*>(h.y_strides);
    cudaGetDevice(&a.hw_info.device_id);
    a.hw_info.sm_count = cutlass::KernelHardwareInfo::query_device_multiprocessor_count(a.hw_info.device_id);
    return a;
  }

  static int64_t workspace(const GroupedProblem& p) {
    return HopperProblems::bytes(p.groups) +
           static_cast<int64_t>(Gemm::get_workspace_size(arguments(p, HopperProblems())));
  }

  static int run(const GroupedProblem& p, void* workspace, void* stream) {
    const HopperProblems h = HopperProblems::at(workspace, p.groups);
    if (const int status = write_hopper_problems(p, h, stream)) return status;
    Gemm gemm;
    const auto a = arguments(p, h);
    if (gemm.can_implement(a) != cutlass::Status::kSuccess) return kUnsupported;
    const auto s = static_cast<cudaStream_t>(stream);
    if (gemm.initialize(a, h.end, s) != cutlass::Status::kSuccess || gemm.run(s) != cutlass::Status::kSuccess) {
      const cudaError_t error = cudaGetLastError();
      return error == cudaSuccess ? cudaErrorUnknown : error;
    }
    return 0;
  }
};

using Inputs = Hopper<InputsKernel>;
using Outputs = Hopper<OutputsKernel>;

}  // namespace

bool hopper_enabled() {
  static const char* const asked = std::getenv("EFFOPS_HOPPER_GROUPED");
  if (asked == nullptr || std::strcmp(asked, "1") != 0) return false;
  int device = 0, major = 0, minor = 0;
  return cudaGetDevice(&device) == cudaSuccess &&
         cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
         cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) == cudaSuccess && major == 9 &&
         minor == 0;
}

int64_t hopper_workspace(const GroupedProblem& p) { return p.w_in == 1 ? Inputs::workspace(p) : Outputs::workspace(p); }

int hopper_grouped(const GroupedProblem& p, void* workspace, void* stream) {
  return p.w_in == 1 ? Inputs::run(p, workspace, stream) : Outputs::run(p, workspace, stream);
}

}  // namespace effops::device

#endif  // EFFOPS_CUTLASS
