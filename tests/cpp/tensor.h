// Test data: tensors of up to four dimensions in guarded memory, NaN wherever nothing was set.
#pragma once

#include <array>
#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <random>
#include <vector>

#include "common/attention_problem.h"
#include "guarded.h"

namespace effops::test {

inline constexpr DType kDTypes[] = {DType::f32, DType::bf16, DType::f16, DType::f64};

// What sums are kept in, and the type of every lse.

// Largest relative error of one rounding to the type.
inline double roundoff(DType t) {
  return t == DType::f64 ? 0x1p-53 : t == DType::f32 ? 0x1p-24 : t == DType::f16 ? 0x1p-11 : 0x1p-8;
}

double decode(DType t, const char* from);
void encode(DType t, double value, char* to);  // the value must be a number of the type

// Multiples of 1/16 up to 2 in magnitude: numbers of every type, whose products and short sums are
// exact in float32.
class Random {
 public:
  explicit Random(uint32_t seed) : engine_(seed) {}
  double value() { return (static_cast<int64_t>(engine_() % 65) - 32) / 16.0; }
  int64_t between(int64_t low, int64_t high) { return low + static_cast<int64_t>(engine_() % (high - low + 1)); }
  template <class T>
  T pick(std::initializer_list<T> choices) {
    return choices.begin()[engine_() % choices.size()];
  }

 private:
  std::minstd_rand engine_;
};

enum class Layout {
  contiguous,
  swapped,  // dimensions 1 and 2 swapped in memory: heads before tokens
  gapped,   // rows of the last dimension lie apart
  strided,  // the last dimension has stride 2
  shared,   // stride 0 in dimension 0, as of expand()
};

class Tensor {
 public:
  using Shape = std::array<int64_t, 4>;

  Tensor() = default;
  Tensor(DType dtype, Shape shape, Layout layout = Layout::contiguous);

  int64_t size(int i) const { return shape_[i]; }
  int64_t stride(int i) const { return stride_[i]; }
  DType dtype() const { return dtype_; }
  char* data() const { return memory_.data(); }
  size_t bytes() const { return memory_.size(); }

  double get(int64_t a, int64_t b, int64_t c, int64_t d) const { return decode(dtype_, at(a, b, c, d)); }
  void set(int64_t a, int64_t b, int64_t c, int64_t d, double value) { encode(dtype_, value, at(a, b, c, d)); }
  void fill(Random& random);
  void freeze() { memory_.freeze(); }
  // No byte between the elements was written.
  bool gaps_intact() const;

  TensorView4 view() const { return {data(), stride_[0], stride_[1], stride_[2], stride_[3]}; }
  RowView rows() const { return {data(), stride_[0], stride_[1], stride_[2]}; }  // last dimension 1

 private:
  char* at(int64_t a, int64_t b, int64_t c, int64_t d) const {
    return data() + (a * stride_[0] + b * stride_[1] + c * stride_[2] + d * stride_[3]) * int64_t(size_of(dtype_));
  }

  DType dtype_ = DType::f32;
  Shape shape_ = {}, stride_ = {};
  Guarded memory_;
};

// A list of index values or logits in frozen guarded memory; empty is null.
template <class T>
class List {
 public:
  List() = default;
  List(const std::vector<T>& values) : memory_(values.size() * sizeof(T)), given_(!values.empty()) {
    if (given_) std::memcpy(memory_.data(), values.data(), memory_.size());
    memory_.freeze();
  }
  const T* get() const { return given_ ? reinterpret_cast<const T*>(memory_.data()) : nullptr; }

 private:
  Guarded memory_;
  bool given_ = false;
};

}  // namespace effops::test
