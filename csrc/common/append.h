// Copies new key or value rows into a cache: the same on every instruction set.
#pragma once

#include "common/views.h"

namespace effops {

struct AppendProblem {  // [batch, tokens, heads, dim] elements of `bytes` bytes; strides in bytes
  int64_t batch = 0, tokens = 0, heads = 0, dim = 0, bytes = 0;
  const char* from = nullptr;
  char* to = nullptr;
  int64_t from_stride[4] = {}, to_stride[4] = {};
  TokenIndices slots;  // where in the cache a token goes; negative skips
};

// Tokens go in order: of two that name one slot the later one stays.
void append_rows(const AppendProblem& p);

}  // namespace effops
