#include "ops/tensor.h"

#include <torch/csrc/stable/ops.h>

#include "ops/backend.h"

namespace effops::ops {

Arg::Arg(const char* op_, const char* name_, const Tensor& t) : op(op_), name(name_), handle(t.get()) {
  int64_t* s = nullptr;
  int64_t* st = nullptr;
  aoti_torch_get_dim(handle, &dim);
  aoti_torch_get_sizes(handle, &s);
  aoti_torch_get_strides(handle, &st);
  aoti_torch_get_dtype(handle, &type);
  aoti_torch_get_device_type(handle, &device_type);
  aoti_torch_get_device_index(handle, &device_index);
  sizes = s;
  strides = st;
}

Arg at_first(Arg all) {
  --all.dim;
  ++all.sizes;
  ++all.strides;
  return all;
}

int64_t Arg::numel() const {
  int64_t n = 1;
  for (int64_t i = 0; i < dim; ++i) n *= sizes[i];
  return n;
}

namespace {

// From the first to the last element.
int64_t extent_bytes(const Arg& a) {
  int64_t last = 0;
  for (int64_t i = 0; i < a.dim; ++i) {
    if (a.size(i) == 0) return 0;
    last += (a.size(i) - 1) * a.stride(i);
  }
  const int32_t type = a.type;
  const bool wide = type == aoti_torch_dtype_float64() || type == aoti_torch_dtype_int64();
  const bool half = type == aoti_torch_dtype_float16() || type == aoti_torch_dtype_bfloat16();
  const bool byte = type == aoti_torch_dtype_int8() || type == aoti_torch_dtype_uint8() ||
                    type == aoti_torch_dtype_bool() || type == aoti_torch_dtype_float8_e4m3fn();
  return (last + 1) * (wide ? 8 : half ? 2 : byte ? 1 : 4);
}

void note_memory(const Arg& a, const void* data, bool writable) {
  Backend* const backend = Backend::current();
  if (backend != nullptr && backend->notes_memory()) backend->note({a.name, data, extent_bytes(a), writable});
}

}  // namespace

const char* Arg::data() const {
  const void* p = nullptr;
  torch_get_const_data_ptr(handle, &p);
  note_memory(*this, p, false);
  return static_cast<const char*>(p);
}

char* Arg::mutable_data() const {
  void* p = nullptr;
  torch_get_mutable_data_ptr(handle, &p);
  note_memory(*this, p, true);
  return static_cast<char*>(p);
}

std::string Arg::shape() const {
  std::string s = "[";
  for (int64_t i = 0; i < dim; ++i) s += (i ? ", " : "") + std::to_string(sizes[i]);
  return s + "]";
}

std::string Arg::type_name() const {
  struct Named {
    int32_t type;
    const char* name;
  };
  const Named known[] = {{aoti_torch_dtype_float32(), "float32"},
                         {aoti_torch_dtype_bfloat16(), "bfloat16"},
                         {aoti_torch_dtype_float16(), "float16"},
                         {aoti_torch_dtype_float64(), "float64"},
                         {aoti_torch_dtype_int32(), "int32"},
                         {aoti_torch_dtype_int64(), "int64"},
                         {aoti_torch_dtype_int16(), "int16"},
                         {aoti_torch_dtype_int8(), "int8"},
                         {aoti_torch_dtype_uint8(), "uint8"},
                         {aoti_torch_dtype_bool(), "bool"},
                         {aoti_torch_dtype_complex64(), "complex64"},
                         {aoti_torch_dtype_complex128(), "complex128"},
                         {aoti_torch_dtype_float8_e4m3fn(), "float8_e4m3fn"}};
  for (const Named& n : known)
    if (n.type == type) return n.name;
  return "dtype code " + std::to_string(type);
}

DType Arg::dtype() const {
  if (type == aoti_torch_dtype_float32()) return DType::f32;
  if (type == aoti_torch_dtype_bfloat16()) return DType::bf16;
  if (type == aoti_torch_dtype_float16()) return DType::f16;
  if (type == aoti_torch_dtype_float64()) return DType::f64;
  fail(op, ": ", name, ": expected dtype float32, bfloat16, float16 or float64, got ", type_name());
}

const Arg& Arg::rank(int64_t expected, const char* layout) const {
  EFFOPS_CHECK(dim == expected, op, ": ", name, ": expected ", expected, " dimensions ", layout, ", got shape ",
               shape());
  return *this;
}

const Arg& Arg::same_dtype(const Arg& other) const {
  EFFOPS_CHECK(type == other.type, op, ": ", name, ": expected dtype ", other.type_name(), " like ", other.name,
               ", got ", type_name());
  return *this;
}

const Arg& Arg::same_device(const Arg& other) const {
  EFFOPS_CHECK(device_type == other.device_type && device_index == other.device_index, op, ": ", name,
               ": expected the device of ", other.name, ", got another one");
  return *this;
}

const Arg& Arg::is(int32_t dtype, const char* dtype_name) const {
  EFFOPS_CHECK(type == dtype, op, ": ", name, ": expected dtype ", dtype_name, ", got ", type_name());
  return *this;
}

void check_shape(const Arg& arg, std::initializer_list<Extent> expected) {
  bool same = arg.dim == static_cast<int64_t>(expected.size());
  int64_t i = 0;
  for (const Extent& e : expected) {
    if (same && e.value >= 0 && arg.sizes[i] != e.value) same = false;
    ++i;
  }
  if (same) return;
  std::string want = "[";
  for (const Extent& e : expected)
    want += (want.size() > 1 ? ", " : "") + (e.value < 0 ? std::string(e.name) : std::to_string(e.value));
  fail(arg.op, ": ", arg.name, ": expected shape ", want, "], got ", arg.shape());
}

int32_t type_int32() { return aoti_torch_dtype_int32(); }
int32_t type_int64() { return aoti_torch_dtype_int64(); }
int32_t type_float32() { return aoti_torch_dtype_float32(); }

int32_t type_of(DType t) {
  switch (t) {
    case DType::f32:
      return aoti_torch_dtype_float32();
    case DType::bf16:
      return aoti_torch_dtype_bfloat16();
    case DType::f16:
      return aoti_torch_dtype_float16();
    case DType::f64:
      return aoti_torch_dtype_float64();
  }
  return -1;
}

namespace {

// The C function: the only allocation path that costs no dispatch through Python-visible ops.
Tensor empty_strided(const int64_t* sizes, int64_t dim, int32_t dtype, const Arg& like) {
  int64_t strides[8];
  int64_t step = 1;
  for (int64_t i = dim; i-- > 0;) {
    strides[i] = step;
    step *= sizes[i] > 0 ? sizes[i] : 1;
  }
  AtenTensorHandle handle = nullptr;
  if (aoti_torch_empty_strided(dim, sizes, strides, dtype, like.device_type, like.device_index, &handle) != 0)
    throw std::bad_alloc();
  return Tensor(handle);
}

}  // namespace

Tensor empty(std::initializer_list<int64_t> sizes, int32_t dtype, const Arg& like) {
  return empty_strided(sizes.begin(), static_cast<int64_t>(sizes.size()), dtype, like);
}

Tensor empty(const std::vector<int64_t>& sizes, int32_t dtype, const Arg& like) {
  EFFOPS_CHECK(sizes.size() <= 8, like.op, ": ", like.name, ": expected at most 8 dimensions, got ", sizes.size());
  return empty_strided(sizes.data(), static_cast<int64_t>(sizes.size()), dtype, like);
}

bool row_space(const Arg& x, RowSpace& rows) {
  if (x.numel() == 0) {  // torch calls it contiguous whatever its strides
    rows.size[0] = 0;
    return true;
  }
  if (x.size(x.dim - 1) > 1 && x.stride(x.dim - 1) != 1) return false;
  int at = 3;
  int64_t size[3] = {1, 1, 1}, stride[3] = {0, 0, 0};
  for (int64_t i = x.dim - 1; i-- > 0;) {
    if (x.size(i) == 1) continue;
    if (at < 3 && x.stride(i) == stride[at] * size[at]) {
      size[at] *= x.size(i);
      continue;
    }
    if (at == 0) return false;
    --at;
    size[at] = x.size(i);
    stride[at] = x.stride(i);
  }
  std::copy(size, size + 3, rows.size);
  std::copy(stride, stride + 3, rows.stride);
  return true;
}

std::vector<int64_t> with_last(const Arg& x, int64_t last) {
  std::vector<int64_t> sizes(x.sizes, x.sizes + x.dim);
  sizes.back() = last;
  return sizes;
}

const char* contiguous_data(const Arg& arg, Tensor& t) {
  int64_t step = 1;
  bool in_order = true;
  for (int64_t i = arg.dim; i-- > 0; step *= arg.size(i))
    in_order = in_order && (arg.size(i) == 1 || arg.stride(i) == step);
  if (in_order) return arg.data();
  t = torch::stable::contiguous(t);
  return Arg(arg.op, arg.name, t).data();
}

}  // namespace effops::ops
