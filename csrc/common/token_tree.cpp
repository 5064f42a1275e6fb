#include "common/token_tree.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <queue>
#include <set>
#include <sstream>
#include <stdexcept>

#include "common/tree.h"

namespace effops {
namespace {

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  message << "TokenTree: ";
  (message << ... << parts);
  throw std::invalid_argument(message.str());
}

std::string text(const TokenTree::Path& path) {
  std::ostringstream s;
  for (size_t i = 0; i < path.size(); ++i) s << (i > 0 ? ", " : "(") << path[i];
  s << (path.empty() ? "()" : path.size() == 1 ? ",)" : ")");
  return s.str();
}

void check_size(const char* argument, int64_t nodes) {
  if (nodes < 1 || nodes > TokenTree::kMostNodes)
    fail(argument, ": expected 1 to ", TokenTree::kMostNodes, " nodes, got ", nodes);
}

std::vector<int32_t> narrow(const std::vector<int64_t>& parents) { return {parents.begin(), parents.end()}; }

void check_acceptance(const TokenTree::Table& acceptance) {
  for (size_t d = 0; d < acceptance.size(); ++d)
    for (size_t r = 0; r < acceptance[d].size(); ++r)
      if (!(acceptance[d][r] >= 0 && acceptance[d][r] <= 1))
        fail("acceptance: expected probabilities in [0, 1], got ", acceptance[d][r], " at index [", d, ", ", r, "]");
}

}  // namespace

TokenTree::TokenTree(std::vector<int64_t> parents, std::optional<std::vector<int64_t>> ranks)
    : parents_(std::move(parents)) {
  check_size("parents", size());
  for (int64_t i = 0; i < size(); ++i) {  // no padding here, and values that int32 may not hold
    const int64_t parent = parents_[i];
    if (i == 0 ? parent != kTreeRoot : parent < 0 || parent >= i)
      fail("parents: expected ", i == 0 ? "-1 (the root)" : "an earlier node", ", got ", parent, " at index ", i);
  }
  if (ranks) {
    ranks_ = std::move(*ranks);
  } else {
    std::vector<int64_t> next(size(), 0);
    ranks_.push_back(-1);
    for (int64_t i = 1; i < size(); ++i) ranks_.push_back(next[parents_[i]]++);
  }
  if (static_cast<int64_t>(ranks_.size()) != size()) fail("ranks: expected ", size(), ", got ", ranks_.size());
  std::set<std::pair<int64_t, int64_t>> taken;
  for (int64_t i = 0; i < size(); ++i)
    if (i == 0 ? ranks_[i] != -1 : ranks_[i] < 0 || !taken.emplace(parents_[i], ranks_[i]).second)
      fail("ranks: expected ", i == 0 ? "-1 (the root)" : "0 or more, different from its siblings'", ", got ",
           ranks_[i], " at index ", i);
  std::vector<int64_t> words(size() * ancestor_words(size()));
  std::vector<int32_t> depths(size());
  pack_ancestors(narrow(parents_).data(), 1, size(), words.data(), depths.data());
  depths_.assign(depths.begin(), depths.end());
}

TokenTree TokenTree::from_paths(std::vector<Path> choices) {
  std::sort(choices.begin(), choices.end(),
            [](const Path& a, const Path& b) { return a.size() != b.size() ? a.size() < b.size() : a < b; });
  choices.erase(std::unique(choices.begin(), choices.end()), choices.end());
  check_size("choices", 1 + static_cast<int64_t>(choices.size()));
  std::map<Path, int64_t> node{{{}, 0}};
  std::vector<int64_t> parents{kTreeRoot}, ranks{-1};
  for (const Path& path : choices) {
    if (path.empty()) fail("choices: expected paths of one rank or more (the root is implied), got ()");
    if (path.back() < 0) fail("choices: expected ranks of 0 or more, got ", text(path));
    const auto parent = node.find(Path(path.begin(), path.end() - 1));
    if (parent == node.end())
      fail("choices: expected every prefix of a path, got ", text(path), " without ",
           text(Path(path.begin(), path.end() - 1)));
    node.emplace(path, static_cast<int64_t>(parents.size()));
    parents.push_back(parent->second);
    ranks.push_back(path.back());
  }
  return TokenTree(std::move(parents), std::move(ranks));
}

TokenTree TokenTree::chain(int64_t nodes) {
  check_size("n", nodes);
  std::vector<int64_t> parents;
  for (int64_t i = 0; i < nodes; ++i) parents.push_back(i - 1);
  return TokenTree(std::move(parents));
}

TokenTree TokenTree::full(const std::vector<int64_t>& widths) {
  std::vector<int64_t> parents{kTreeRoot};
  int64_t first = 0;  // of the level above
  for (int64_t width : widths) {
    if (width < 1) fail("widths: expected numbers of 1 or more, got ", width);
    const int64_t end = static_cast<int64_t>(parents.size());
    if (width > kMostNodes || end + (end - first) * width > kMostNodes)
      fail("widths: expected 1 to ", kMostNodes, " nodes, got more");
    for (int64_t i = first; i < end; ++i) parents.insert(parents.end(), width, i);
    first = end;
  }
  return TokenTree(std::move(parents));
}

TokenTree TokenTree::optimal(const Table& acceptance, std::vector<std::pair<int64_t, double>> step_times) {
  check_acceptance(acceptance);
  std::sort(step_times.begin(), step_times.end());
  if (step_times.empty()) fail("step_times: expected one size or more, got none");
  for (const auto& [nodes, seconds] : step_times) {
    check_size("step_times", nodes);
    if (!(seconds > 0 && std::isfinite(seconds)))
      fail("step_times: expected seconds above 0, got ", seconds, " for size ", nodes);
  }
  std::vector<std::vector<int64_t>> by_value;  // ranks of a level, the likeliest first
  for (const std::vector<double>& level : acceptance) {
    std::vector<int64_t>& order = by_value.emplace_back();
    for (size_t r = 0; r < level.size(); ++r) order.push_back(static_cast<int64_t>(r));
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return level[a] > level[b]; });
  }

  // Paths by falling score. A path waits until the one above it and the likelier one beside it are taken, so those
  // taken are closed under prefixes, ties and certain steps included.
  struct Waiting {
    double score, above;  // of the path and of its parent
    Path places;          // in by_value
  };
  const auto later = [](const Waiting& a, const Waiting& b) {
    return a.score != b.score ? a.score < b.score : a.places > b.places;
  };
  std::priority_queue<Waiting, std::vector<Waiting>, decltype(later)> waiting(later);
  const auto push = [&](double above, Path places) {
    const size_t level = places.size() - 1;
    if (level >= acceptance.size() || places.back() >= static_cast<int64_t>(by_value[level].size())) return;
    waiting.push({above * acceptance[level][by_value[level][places.back()]], above, std::move(places)});
  };
  push(1, {0});

  const int64_t largest = step_times.back().first;
  std::vector<Path> taken;
  size_t best = 0;
  double tokens = 1, best_rate = -1;
  for (size_t next = 0;;) {  // step_times[next] is the first at or above the size
    const int64_t nodes = 1 + static_cast<int64_t>(taken.size());
    while (step_times[next].first < nodes) ++next;
    if (nodes >= step_times[0].first) {
      double seconds = step_times[next].second;
      if (step_times[next].first > nodes) {
        const auto& [n0, t0] = step_times[next - 1];
        const auto& [n1, t1] = step_times[next];
        seconds = t0 + (t1 - t0) * static_cast<double>(nodes - n0) / static_cast<double>(n1 - n0);
      }
      if (tokens / seconds > best_rate) {
        best_rate = tokens / seconds;
        best = taken.size();
      }
    }
    if (nodes == largest || waiting.empty()) break;
    const Waiting top = waiting.top();
    waiting.pop();
    tokens += top.score;
    Path& ranks = taken.emplace_back();
    for (size_t level = 0; level < top.places.size(); ++level) ranks.push_back(by_value[level][top.places[level]]);
    Path below = top.places, beside = top.places;
    below.push_back(0);
    ++beside.back();
    push(top.score, std::move(below));
    push(top.above, std::move(beside));
  }
  if (best_rate < 0) best = taken.size();  // the table has fewer paths than the smallest size has nodes
  taken.resize(best);
  return from_paths(std::move(taken));
}

int64_t TokenTree::max_depth() const { return *std::max_element(depths_.begin(), depths_.end()); }

std::vector<std::vector<int64_t>> TokenTree::children() const {
  std::vector<std::vector<int64_t>> of(size());
  for (int64_t i = 1; i < size(); ++i) of[parents_[i]].push_back(i);
  return of;
}

std::vector<int64_t> TokenTree::leaves() const {
  std::vector<int64_t> found;
  const std::vector<std::vector<int64_t>> below = children();
  for (int64_t i = 0; i < size(); ++i)
    if (below[i].empty()) found.push_back(i);
  return found;
}

std::vector<TokenTree::Path> TokenTree::paths() const {
  std::vector<Path> found;
  for (int64_t leaf : leaves()) {
    Path path(depths_[leaf] + 1);
    for (int64_t i = leaf; i >= 0; i = parents_[i]) path[depths_[i]] = i;
    found.push_back(std::move(path));
  }
  return found;
}

std::vector<int64_t> TokenTree::ancestors() const {
  std::vector<int64_t> words(size() * ancestor_words(size()));
  std::vector<int32_t> depths(size());
  pack_ancestors(narrow(parents_).data(), 1, size(), words.data(), depths.data());
  return words;
}

TokenTree TokenTree::truncated(int64_t max_depth, int64_t max_nodes) const {
  if (max_depth < 0) fail("max_depth: expected 0 or more, got ", max_depth);
  if (max_nodes < 1) fail("max_nodes: expected 1 or more, got ", max_nodes);
  std::vector<int64_t> parents, ranks, place(size());
  for (int64_t i = 0; i < size() && static_cast<int64_t>(parents.size()) < max_nodes; ++i) {
    if (depths_[i] > max_depth) continue;
    place[i] = static_cast<int64_t>(parents.size());
    parents.push_back(i == 0 ? kTreeRoot : place[parents_[i]]);
    ranks.push_back(ranks_[i]);
  }
  return TokenTree(std::move(parents), std::move(ranks));
}

double TokenTree::expected(const Table& acceptance) const {
  check_acceptance(acceptance);
  std::vector<double> score(size(), 1.0);
  double tokens = 1;
  for (int64_t i = 1; i < size(); ++i) {
    const size_t level = depths_[i] - 1, rank = ranks_[i];
    const bool known = level < acceptance.size() && rank < acceptance[level].size();
    tokens += score[i] = known ? score[parents_[i]] * acceptance[level][rank] : 0;
  }
  return tokens;
}

}  // namespace effops
