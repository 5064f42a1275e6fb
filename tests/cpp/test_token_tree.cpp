// The host's token tree: its parts, its constructors, what it refuses.
#include <functional>

#include "check.h"
#include "common/token_tree.h"

namespace effops::test {
namespace {

using List = std::vector<int64_t>;

TEST(token_tree_parts) {
  const TokenTree tree({-1, 0, 1, 0, 1, 3});
  CHECK((tree.depths() == List{0, 1, 2, 1, 2, 2}) && tree.max_depth() == 2, "depths");
  CHECK((tree.ranks() == List{-1, 0, 0, 1, 1, 0}), "ranks");
  CHECK((tree.leaves() == List{2, 4, 5}), "leaves");
  CHECK((tree.children() == std::vector<List>{{1, 3}, {2, 4}, {}, {5}, {}, {}}), "children");
  CHECK((tree.paths() == std::vector<List>{{0, 1, 2}, {0, 1, 4}, {0, 3, 5}}), "paths");
  CHECK((tree.ancestors() == List{1, 3, 7, 9, 19, 41}), "ancestors");
  CHECK((tree.truncated(1, 9).parents() == List{-1, 0, 0}) && (tree.truncated(9, 4).parents() == List{-1, 0, 1, 0}),
        "truncated");
  CHECK(tree.expected({{0.5, 0.25}, {0.5, 0.25}}) == 1 + 0.5 + 0.25 + 0.25 + 0.125 + 0.125, "expected");
}

TEST(token_tree_of_the_largest_size) {
  const TokenTree chain = TokenTree::chain(TokenTree::kMostNodes);
  CHECK(chain.max_depth() == 1023 && chain.ancestors().size() == 1024 * 16, chain.max_depth());
  CHECK(chain.truncated(2000, 1000).paths().at(0).back() == 999, "truncated");
  CHECK(TokenTree::full({1023}).leaves().size() == 1023, "full");
}

TEST(token_tree_from_paths) {
  const TokenTree tree = TokenTree::from_paths({{2, 0}, {0}, {2}, {0, 3}, {0}});
  CHECK((tree.parents() == List{-1, 0, 0, 1, 2}) && (tree.ranks() == List{-1, 0, 2, 3, 0}), "nodes");
  CHECK(TokenTree::from_paths({}).size() == 1, "no path");
}

// Scores: rank 1 of 0.6, below it 0.3 and 0.12; rank 0 of 0.2, below it 0.1 and 0.04.
TEST(token_tree_optimal) {
  const TokenTree::Table table{{0.2, 0.6}, {0.5, 0.2}};
  const TokenTree three = TokenTree::optimal(table, {{9, 3.0}, {1, 1.0}, {3, 1.1}});
  CHECK((three.parents() == List{-1, 0, 1}) && (three.ranks() == List{-1, 1, 0}), "three nodes");
  CHECK(TokenTree::optimal(table, {{1, 1.0}, {9, 1.0}}).size() == 7, "all paths");
  CHECK(TokenTree::optimal(table, {{4, 1.0}, {5, 2.0}}).size() == 4, "none smaller than the smallest");
  CHECK(TokenTree::optimal(table, {{100, 1.0}}).size() == 7, "fewer paths than the smallest size");
  CHECK(TokenTree::optimal({}, {{1, 1.0}}).size() == 1, "no choices");
  // Certain and impossible steps: a path never comes without the one above it.
  CHECK(TokenTree::optimal({{1, 1}, {1, 0}, {0, 1}}, {{12, 1.0}}).size() == 12, "ties");
}

TEST(token_tree_refuses) {
  const std::function<void()> wrong[] = {
      [] { TokenTree({}); },
      [] { TokenTree({0}); },
      [] { TokenTree({-1, 1}); },
      [] { TokenTree({-1, -1}); },
      [] { TokenTree({-1, INT64_MAX}); },
      [] { TokenTree({-1, 0}, List{-1, -1}); },
      [] { TokenTree({-1, 0, 0}, List{-1, 4, 4}); },
      [] { TokenTree::from_paths({{0, 0}}); },
      [] { TokenTree::from_paths({{}}); },
      [] { TokenTree::chain(1025); },
      [] { TokenTree::chain(INT64_MIN); },
      [] { TokenTree::full({INT64_MAX, INT64_MAX}); },
      [] { TokenTree::optimal({{NAN}}, {{1, 1.0}}); },
      [] { TokenTree::optimal({}, {{1, NAN}}); },
      [] { TokenTree::optimal({}, {}); },
      [] { TokenTree({-1}).truncated(-1, 1); },
      [] { TokenTree({-1}).truncated(1, 0); },
  };
  int at = 0;
  for (const auto& call : wrong) {
    bool refused = false;
    try {
      call();
    } catch (const std::invalid_argument& e) {
      refused = std::string(e.what()).rfind("TokenTree: ", 0) == 0;
    }
    CHECK(refused, "call ", at);
    ++at;
  }
}

}  // namespace
}  // namespace effops::test
