// Token trees as rows of parents: node 0 is the root (-1), parents come before their children, -2 is
// padding. A row of padding alone is an absent sequence.
#pragma once

#include <cstdint>

namespace effops {

inline constexpr int32_t kTreeRoot = -1, kTreePadding = -2;

struct TreeFault {
  int64_t node = -1;               // the first node whose parent is wrong; -1: none
  const char* expected = nullptr;  // what its parent should have been
};
TreeFault tree_fault(const int32_t* parents, int64_t stride, int64_t nodes);

constexpr int64_t ancestor_words(int64_t nodes) { return (nodes + 63) / 64; }

// Of a row without fault: `words` [nodes, ancestor_words(nodes)], bit j & 63 of word j >> 6 for each
// ancestor j of a node and for itself; `depths` [nodes], 0 for the root. Padding sees itself, at depth 0.
void pack_ancestors(const int32_t* parents, int64_t stride, int64_t nodes, int64_t* words, int32_t* depths);

}  // namespace effops
