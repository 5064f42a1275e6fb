#include "ops/packed.h"

#include <torch/csrc/stable/ops.h>

namespace effops::ops {
namespace {

std::optional<PackedFormat> format_of(const Arg& weight) {
  if (weight.type == aoti_torch_dtype_uint8()) return PackedFormat::int4;
  if (weight.type == aoti_torch_dtype_int8()) return PackedFormat::int8;
  if (weight.type == aoti_torch_dtype_float8_e4m3fn()) return PackedFormat::fp8_e4m3;
  return std::nullopt;
}

}  // namespace

bool is_packed(const Arg& weight) { return format_of(weight).has_value(); }

PackedMatrix packed_matrix(const Arg& weight, int64_t in, const Arg& like) {
  PackedMatrix m;
  m.format = *format_of(weight);
  weight.rank(2, "[N, row bytes]").same_device(like);
  EFFOPS_CHECK(like.dtype() != DType::f64, weight.op, ": ", like.name,
               ": expected dtype float32, bfloat16 or float16 beside a packed weight, got float64");
  const int64_t bytes = weight.size(1), padded = (in + kPackedSteps - 1) / kPackedSteps * kPackedSteps;
  const int64_t steps = bytes - padded * m.bits() / 8, groups = steps / kPackedWord;
  const bool whole = in == 0 ? bytes == 0 : steps > 0 && steps % kPackedWord == 0 && in % groups == 0;
  EFFOPS_CHECK(whole && (groups <= 1 || in / groups % kPackedSteps == 0), weight.op, ": ", weight.name,
               ": expected rows of K = ", in, " inputs in ", m.bits(), " bits, padded to ", kPackedSteps,
               ", and 4 bytes a group of them, got ", bytes, " bytes");
  const bool in_line = (bytes <= 1 || weight.stride(1) == 1) && (weight.size(0) <= 1 || weight.stride(0) == bytes);
  EFFOPS_CHECK(in_line || weight.numel() == 0, weight.op, ": ", weight.name,
               ": expected contiguous memory, got strides of a packed weight's part");
  m.out = weight.size(0);
  m.in = in;
  m.group = groups == 0 ? 0 : in / groups;
  m.data = weight.data();
  EFFOPS_CHECK(
      weight.device_type == aoti_torch_device_type_cpu() || reinterpret_cast<uintptr_t>(m.data) % kPackedWord == 0,
      weight.op, ": ", weight.name, ": expected memory aligned to ", kPackedWord, " bytes on devices, got ",
      reinterpret_cast<uintptr_t>(m.data) % kPackedWord, " more");
  return m;
}

}  // namespace effops::ops
