// Copies new key or value rows into a cache: the same on every instruction set.
#pragma once

#include <cstdint>

namespace effops {

struct AppendProblem {  // [batch, tokens, heads, dim] elements of `bytes` bytes; strides in bytes
  int64_t batch = 0, tokens = 0, heads = 0, dim = 0, bytes = 0;
  const char* from = nullptr;
  char* to = nullptr;
  int64_t from_stride[4] = {}, to_stride[4] = {};
  const int32_t* slots = nullptr;  // [batch, tokens]: token slot in the cache; negative skips
  int64_t slots_batch = 0, slots_token = 0;
};

// Tokens go in order: of two that name one slot the later one stays.
void append_rows(const AppendProblem& p);

}  // namespace effops
