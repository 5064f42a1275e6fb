#include "common/tree.h"

#include <algorithm>

namespace effops {

TreeFault tree_fault(const int32_t* parents, int64_t stride, int64_t nodes) {
  for (int64_t i = 0; i < nodes; ++i) {
    const int64_t parent = parents[i * stride];
    if (parent == kTreePadding) continue;
    if (i == 0) {
      if (parent != kTreeRoot) return {i, "-1 (the root) first, or -2 (padding) alone"};
    } else if (parent < 0 || parent >= i) {
      return {i, "an earlier node or -2 (padding)"};
    } else if (parents[parent * stride] == kTreePadding) {
      return {i, "a parent that is not padding"};
    }
  }
  return {};
}

void pack_ancestors(const int32_t* parents, int64_t stride, int64_t nodes, int64_t* words, int32_t* depths) {
  const int64_t width = ancestor_words(nodes);
  for (int64_t i = 0; i < nodes; ++i) {
    const int64_t parent = parents[i * stride];
    int64_t* row = words + i * width;
    if (parent < 0) {
      std::fill(row, row + width, 0);
      depths[i] = 0;
    } else {
      std::copy(words + parent * width, words + (parent + 1) * width, row);
      depths[i] = depths[parent] + 1;
    }
    row[i >> 6] |= static_cast<int64_t>(uint64_t{1} << (i & 63));
  }
}

}  // namespace effops
