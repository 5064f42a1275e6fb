// The host's token tree: an immutable shape, checked once, and the shapes that drafters start from.
#pragma once

#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

namespace effops {

class TokenTree {
 public:
  static constexpr int64_t kMostNodes = 1024;
  using Path = std::vector<int64_t>;
  using Table = std::vector<std::vector<double>>;  // [depth - 1][rank]: right, if the parent's path is

  // All of these throw std::invalid_argument that says what is wrong. Without ranks siblings count from 0.
  explicit TokenTree(std::vector<int64_t> parents, std::optional<std::vector<int64_t>> ranks = {});
  // Paths of ranks with all their prefixes, in any order; nodes go by length, then lexicographically.
  static TokenTree from_paths(std::vector<Path> choices);
  static TokenTree chain(int64_t nodes);
  static TokenTree full(const std::vector<int64_t>& widths);
  // The tree with the most expected tokens a second; times in seconds by size, linear between given ones.
  static TokenTree optimal(const Table& acceptance, std::vector<std::pair<int64_t, double>> step_times);

  int64_t size() const { return static_cast<int64_t>(parents_.size()); }
  const std::vector<int64_t>& parents() const { return parents_; }
  const std::vector<int64_t>& ranks() const { return ranks_; }  // which child of its parent's choices; -1 of the root
  const std::vector<int64_t>& depths() const { return depths_; }
  int64_t max_depth() const;
  std::vector<std::vector<int64_t>> children() const;
  std::vector<int64_t> leaves() const;
  std::vector<Path> paths() const;         // nodes from the root to each leaf
  std::vector<int64_t> ancestors() const;  // [size, ancestor_words(size)], see tree.h

  // The first nodes of a depth up to the given one.
  TokenTree truncated(int64_t max_depth, int64_t max_nodes) const;
  // Tokens that a step emits: 1 and the probability of every node. Ranks that the table lacks are never right.
  double expected(const Table& acceptance) const;

 private:
  std::vector<int64_t> parents_, ranks_, depths_;
};

}  // namespace effops
