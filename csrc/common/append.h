// Copies new key or value rows into a cache and moves rows within one: the same on every instruction
// set. Views are in elements of `bytes` bytes.
#pragma once

#include "common/views.h"

namespace effops {

struct AppendProblem {
  int64_t batch = 0, tokens = 0, heads = 0, dim = 0, bytes = 0;
  TensorView4 from, to;  // [batch, tokens, heads, dim] into a cache
  PageTable pages;       // of the cache
  TokenIndices slots;    // where in the sequence a token goes; negative skips
  CacheLimits limits;
};

// `dim` elements of `bytes` bytes that lie so many elements apart.
void copy_row(const char* from, int64_t from_step, char* to, int64_t to_step, int64_t dim, int64_t bytes);

// Tokens go in order: of two that name one slot the later one stays.
void append_rows(const AppendProblem& p);

struct CommitProblem {  // token starts[b] + nodes[b][j] moves to starts[b] + j
  int64_t batch = 0, nodes_a_row = 0, heads = 0, dim = 0, bytes = 0;
  TensorView4 cache;
  PageTable pages;
  TokenIndices nodes;  // ascending, negative from the end on
  const int32_t* starts = nullptr;
  CacheLimits limits;
};

// In order of j, so that a row is read before another takes its place.
void commit_rows(const CommitProblem& p);

}  // namespace effops
