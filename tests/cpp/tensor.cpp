#include "tensor.h"

#include <bit>

namespace effops::test {
namespace {

template <class T>
T read(const char* from) {
  T value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

double decode_f16(uint16_t bits) {
  const double sign = bits >> 15 ? -1 : 1;
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  if (exponent == 31) return fraction ? NAN : sign * INFINITY;
  return sign * (exponent == 0 ? std::ldexp(fraction, -24) : std::ldexp(1024 + fraction, exponent - 25));
}

uint16_t encode_f16(double value) {
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  if (value == 0) return sign;
  if (!std::isfinite(value)) return sign | (std::isnan(value) ? 0x7e00 : 0x7c00);
  int exponent;
  const double fraction = std::frexp(std::abs(value), &exponent) * 2 - 1;  // value = (1 + fraction) * 2^(exponent - 1)
  return static_cast<uint16_t>(sign | (exponent + 14) << 10 | static_cast<int>(fraction * 1024));
}

}  // namespace

double decode(DType t, const char* from) {
  switch (t) {
    case DType::f64:
      return read<double>(from);
    case DType::f32:
      return read<float>(from);
    case DType::bf16:
      return std::bit_cast<float>(uint32_t(read<uint16_t>(from)) << 16);
    case DType::f16:
      return decode_f16(read<uint16_t>(from));
  }
  return NAN;
}

void encode(DType t, double value, char* to) {
  const float narrow = static_cast<float>(value);
  const uint16_t half =
      t == DType::f16 ? encode_f16(value) : static_cast<uint16_t>(std::bit_cast<uint32_t>(narrow) >> 16);
  if (t == DType::f64) {
    std::memcpy(to, &value, sizeof value);
  } else if (t == DType::f32) {
    std::memcpy(to, &narrow, sizeof narrow);
  } else {
    std::memcpy(to, &half, sizeof half);
  }
}

Tensor::Tensor(DType dtype, Shape shape, Layout layout) : dtype_(dtype), shape_(shape) {
  const int inner = layout == Layout::swapped ? 1 : 2, outer = layout == Layout::swapped ? 2 : 1;
  stride_[3] = layout == Layout::strided ? 2 : 1;
  stride_[inner] = shape[3] * stride_[3] + (layout == Layout::gapped ? 3 : 0);
  stride_[outer] = shape[inner] * stride_[inner];
  stride_[0] = layout == Layout::shared ? 0 : shape[outer] * stride_[outer];
  int64_t elements = 1;
  for (int i = 0; i < 4; ++i) elements = shape[i] == 0 ? 0 : elements;
  for (int i = 0; i < 4 && elements > 0; ++i) elements += (shape[i] - 1) * stride_[i];
  memory_ = Guarded(elements * size_of(dtype));
}

void Tensor::fill(Random& random) {
  for (int64_t a = 0; a < shape_[0]; ++a)
    for (int64_t b = 0; b < shape_[1]; ++b)
      for (int64_t c = 0; c < shape_[2]; ++c)
        for (int64_t d = 0; d < shape_[3]; ++d) set(a, b, c, d, random.value());
}

bool Tensor::gaps_intact() const {
  const int64_t width = size_of(dtype_);
  std::vector<bool> owned(memory_.size());
  for (int64_t a = 0; a < shape_[0]; ++a)
    for (int64_t b = 0; b < shape_[1]; ++b)
      for (int64_t c = 0; c < shape_[2]; ++c)
        for (int64_t d = 0; d < shape_[3]; ++d)
          for (int64_t i = 0; i < width; ++i) owned[at(a, b, c, d) - data() + i] = true;
  for (size_t i = 0; i < owned.size(); ++i)
    if (!owned[i] && static_cast<unsigned char>(data()[i]) != Guarded::kFill) return false;
  return true;
}

}  // namespace effops::test
