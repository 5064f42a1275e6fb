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
#include "common/verify.h"
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

// Of the first item along the first dimension.
Arg at_first(Arg all);

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

// The elements of t in order: t becomes a copy where they do not lie so.
const char* contiguous_data(const Arg& arg, Tensor& t);

// Are the argument's values to be checked, where they lie?
bool checked_in_place(const Arg& a);

// The values of an index argument where checks can read them: the argument itself, or a copy of device memory. Nothing
// where values are not to be checked. Strides are those of the first three dimensions.
template <class T>
class Readable {
 public:
  Readable() = default;
  explicit Readable(const Arg& a);

  explicit operator bool() const { return there_; }
  const T* data() const { return view_.data; }
  int64_t stride(int64_t i) const { return view_.stride[i]; }
  T at(int64_t i, int64_t j = 0, int64_t k = 0) const { return view_.at(i, j, k); }

 private:
  bool there_ = false;
  Strided<T> view_;
  std::optional<Tensor> copy_;
};

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
    count_ = a.size(0);
    if (count_ <= 1 || a.stride(0) == 1) {
      data_ = reinterpret_cast<const T*>(a.data());
    } else {
      copy_ = *t;
      data_ = reinterpret_cast<const T*>(contiguous_data(a, *copy_));
    }
    if (checked_in_place(a)) {
      host_ = data_;
    } else if (const Readable<T> values{a}) {
      for (int64_t i = 0; i < count_; ++i) host_copy_.push_back(values.at(i));
      host_ = host_copy_.data();
    }
  }
  Values(const Values&) = delete;

  const T* get() const { return data_; }
  // What checks may read; null where no values are given, or are not to be checked.
  const T* host() const { return host_; }
  int64_t count() const { return count_; }

 private:
  const T *data_ = nullptr, *host_ = nullptr;
  int64_t count_ = 0;
  std::optional<Tensor> copy_;
  std::vector<T> host_copy_;
};

// Every value lies in [low, high], where it is checked. `high_name` says what the upper bound is.
void check_range(const char* op, const char* name, const Values<int32_t>& values, int64_t low, int64_t high,
                 const char* high_name);

// int32 [B, T] of a call over B sequences of T tokens, every value in [low, end) where it is checked.
TokenIndices token_indices(const Arg& indices, const Arg& like, int64_t batch, int64_t tokens, int64_t low,
                           int64_t end);

// Can the rows of x be numbered without a copy: last dimension contiguous, at most three outer ones
// once neighbours that lie in line are joined.
bool row_space(const Arg& x, RowSpace& rows);

// The sizes of x with another last one.
std::vector<int64_t> with_last(const Arg& x, int64_t last);

}  // namespace effops::ops
