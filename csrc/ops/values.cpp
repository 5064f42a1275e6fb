// Index values and their checks, where the host can read them.
#include <torch/csrc/stable/ops.h>

#include "ops/backend.h"

namespace effops::ops {

bool checked_in_place(const Arg& a) { return checks_values() && a.device_type == aoti_torch_device_type_cpu(); }

template <class T>
Readable<T>::Readable(const Arg& a) : there_(checks_values()) {
  if (!there_) return;
  Arg readable = a;
  if (!checked_in_place(a)) {
    AtenTensorHandle handle = nullptr;
    aoti_torch_new_tensor_handle(a.handle, &handle);
    copy_ = torch::stable::to(Tensor(handle), torch::stable::Device(torch::headeronly::DeviceType::CPU));
    readable = Arg(a.op, a.name, *copy_);
  }
  view_.data = reinterpret_cast<const T*>(readable.data());
  std::copy(readable.strides, readable.strides + std::min<int64_t>(readable.dim, 3), view_.stride);
}
template class Readable<int32_t>;
template class Readable<int64_t>;
template class Readable<float>;
template class Readable<double>;

void check_range(const char* op, const char* name, const Values<int32_t>& values, int64_t low, int64_t high,
                 const char* high_name) {
  for (int64_t i = 0; values.host() != nullptr && i < values.count(); ++i) {
    const int64_t v = values.host()[i];
    EFFOPS_CHECK(v >= low && v <= high, op, ": ", name, ": expected values in [", low, ", ", high, "] (", high_name,
                 "), got ", v, " at index ", i);
  }
}

TokenIndices token_indices(const Arg& indices, const Arg& like, int64_t batch, int64_t tokens, int64_t low,
                           int64_t end) {
  indices.is(type_int32(), "int32").same_device(like);
  check_shape(indices, {{"B", batch}, {"T", tokens}});
  if (const Readable<int32_t> all{indices}) {
    for (int64_t b = 0; b < batch; ++b)
      for (int64_t t = 0; t < tokens; ++t) {
        const int64_t v = all.at(b, t);
        EFFOPS_CHECK(v >= low && v < end, indices.op, ": ", indices.name, ": expected values in [", low, ", ", end,
                     "), got ", v, " at index [", b, ", ", t, "]");
      }
  }
  return {reinterpret_cast<const int32_t*>(indices.data()), indices.stride(0), indices.stride(1)};
}

}  // namespace effops::ops
