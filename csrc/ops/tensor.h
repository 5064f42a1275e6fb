// What the op bindings share: tensors as plain facts, checks in the project's error format,
// allocation. Only csrc/ops includes torch.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "common/dtype.h"
#include "common/views.h"

namespace effops::ops {

using torch::stable::Tensor;

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

#define EFFOPS_CHECK(condition, ...) \
  if (!(condition)) [[unlikely]]     \
  ::effops::ops::fail(__VA_ARGS__)

// One argument of one op.
struct Arg {
  Arg(const char* op, const char* name, const Tensor& t);

  const char *op, *name;
  AtenTensorHandle handle;
  int64_t dim;
  const int64_t *sizes, *strides;
  int32_t type, device_type, device_index;

  int64_t size(int64_t i) const { return sizes[i]; }
  int64_t stride(int64_t i) const { return strides[i]; }
  int64_t numel() const;
  const char* data() const;
  char* mutable_data() const;
  std::string shape() const;
  std::string type_name() const;

  DType dtype() const;  // throws unless float32, bfloat16, float16 or float64
  const Arg& rank(int64_t expected, const char* layout) const;
  const Arg& same_dtype(const Arg& other) const;
  const Arg& same_device(const Arg& other) const;
  const Arg& is(int32_t dtype, const char* dtype_name) const;
};

// A named extent; value < 0 accepts anything.
struct Extent {
  const char* name;
  int64_t value;
};
void check_shape(const Arg& arg, std::initializer_list<Extent> expected);

int32_t type_int32();
int32_t type_int64();
int32_t type_float32();
int32_t type_of(DType t);

Tensor empty(std::initializer_list<int64_t> sizes, int32_t dtype, const Arg& like);
Tensor empty(const std::vector<int64_t>& sizes, int32_t dtype, const Arg& like);

// A 1-D int32 or float32 argument as contiguous memory: borrowed where it is, copied where not.
template <class T>
class Values {
 public:
  Values(const char* op, const char* name, const std::optional<Tensor>& t, Extent extent, const Arg& like) {
    if (!t) return;
    const Arg a(op, name, *t);
    a.same_device(like);
    if constexpr (std::is_same_v<T, int32_t>) {
      a.is(type_int32(), "int32");
    } else {
      a.is(type_float32(), "float32");
    }
    check_shape(a, {extent});
    const T* from = reinterpret_cast<const T*>(a.data());
    count_ = a.size(0);
    if (a.size(0) <= 1 || a.stride(0) == 1) {
      data_ = from;
      return;
    }
    for (int64_t i = 0; i < count_; ++i) copy_.push_back(from[i * a.stride(0)]);
    data_ = copy_.data();
  }
  Values(const Values&) = delete;

  const T* get() const { return data_; }
  int64_t count() const { return count_; }

 private:
  const T* data_ = nullptr;
  int64_t count_ = 0;
  std::vector<T> copy_;
};

// Every value lies in [low, high]. `high_name` says what the upper bound is.
void check_range(const char* op, const char* name, const Values<int32_t>& values, int64_t low, int64_t high,
                 const char* high_name);

// int32 [B, T] of a call over B sequences of T tokens, every value in [low, end).
TokenIndices token_indices(const Arg& indices, const Arg& like, int64_t batch, int64_t tokens, int64_t low,
                           int64_t end);

// Can the rows of x be numbered without a copy: last dimension contiguous, at most three outer ones
// once neighbours that lie in line are joined.
bool row_space(const Arg& x, RowSpace& rows);

// The elements of t in order: t becomes a copy where they do not lie so.
const char* contiguous_data(const Arg& arg, Tensor& t);

// The sizes of x with another last one.
std::vector<int64_t> with_last(const Arg& x, int64_t last);

}  // namespace effops::ops
