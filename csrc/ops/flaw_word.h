// One word of device memory that kernels report flawed rows into, where calls are checked.
#pragma once

#include "ops/backend.h"

namespace effops::ops {

class FlawWord {
 public:
  FlawWord(const Backend& backend, const Arg& like);

  int64_t* data() const { return data_; }  // null: nothing is to be reported
  std::optional<int64_t> read() const;     // the least report, if there is one; waits for the kernels

 private:
  std::optional<Tensor> memory_;
  int64_t* data_ = nullptr;
};

}  // namespace effops::ops
