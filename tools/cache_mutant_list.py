"""The bugs that tools/mutants.py plants around KV caches: pages, shared prefixes, selection, eviction, merging."""

from __future__ import annotations

from mutant import Mutant

LABEL_KEYS, PAGE_SEARCH = (f"csrc/cpu/selection/{f}.h" for f in ("label_keys", "page_search"))
MASS, EVICT = "csrc/cpu/attention/mass.h", "csrc/common/evict.cpp"
KV_MERGE = "csrc/cpu/selection/kv_merge.h"
TILE = "csrc/cpu/attention/tile.h"

CACHE_MUTANTS = (
    Mutant(
        "list-lengths-of-the-first-head",
        "csrc/ops/selection.cpp",
        "selection_.counts_head = head;",
        "selection_.counts_head = 0;",
        "lists with gaps, of different lengths",
    ),
    Mutant(
        "mask-on-the-first-level",
        "csrc/ops/cascade.cpp",
        "const bool last = i == levels - 1;",
        "const bool last = i == 0;",
        "a cascade of two levels whose last is causal",
    ),
    Mutant(
        "levels-in-one-place",
        "csrc/ops/cascade.cpp",
        "at = level * merge.rows;",
        "at = 0;",
        "a cascade of two levels",
    ),
    Mutant(
        "mass-of-rows-without-keys",
        MASS,
        "return lse == kNegInf<C> ? -kNegInf<C> : lse;",
        "return lse;",
        "rows whose lse is -inf",
    ),
    Mutant(
        "mass-of-padding-rows",
        MASS,
        "g.state[i] = m < g.rows ? this->divisor(row) : -kNegInf<C>;",
        "g.state[i] = this->divisor(row);",
        "three or five rows a KV head",
    ),
    Mutant(
        "mass-of-the-last-block",
        MASS,
        "(V::load(to + j) + V::load(block + j)).store(to + j);",
        "(V::load(to + j) * V::zero() + V::load(block + j)).store(to + j);",
        "more rows than a block has",
    ),
    Mutant(
        "mass-behind-the-queries",
        MASS,
        "if (!full) mask_row(rows_, see_, row, first, keys, s, 1);",
        "",
        "many causal rows",
    ),
    Mutant(
        "evicts-the-newest-of-equals",
        EVICT,
        "oldest = std::min(oldest, may ? positions_[j] : INT32_MAX);",
        "if (may) oldest = positions_[j];",
        "entries of equal masses",
    ),
    Mutant(
        "evicts-beside-free-slots",
        EVICT,
        "while (free_ < p_.slots && positions_[free_] >= 0) ++free_;",
        "if (free_ < p_.slots && positions_[free_] >= 0) ++free_;",
        "several entries before a free slot",
    ),
    Mutant(
        "merges-into-the-last-of-equals",
        KV_MERGE,
        "if (!(score[i] > best_[e])) continue;",
        "if (!(score[i] >= best_[e])) continue;",
        "kept keys of one direction",
    ),
    Mutant(
        "merges-into-the-first-tile-alone",
        KV_MERGE,
        "place_[e] = static_cast<int32_t>(first + i);",
        "place_[e] = static_cast<int32_t>(i);",
        "more kept entries than a tile has",
    ),
    Mutant(
        "merges-by-inner-products",
        KV_MERGE,
        "norm > 0 ? to[d] / norm : C(0);",
        "norm > 0 ? to[d] : C(0);",
        "keys of any norms",
    ),
    Mutant(
        "merges-what-is-below-the-least",
        KV_MERGE,
        "static_cast<double>(best_[e]) >= p_.least",
        "static_cast<double>(best_[e]) > p_.least",
        "a similarity that is the least one",
    ),
    Mutant(
        "merged-means-of-the-evicted-alone",
        KV_MERGE,
        "static_cast<C>(counts[i] + 1)",
        "static_cast<C>(counts[i])",
        "one entry merged into another",
    ),
    Mutant(
        "pivotal-is-averaged",
        "csrc/common/kv_merge_problem.h",
        "return (evicted - kept) / 2;",
        "return evicted - kept;",
        "pivotal merges",
    ),
    Mutant(
        "labels-forget-a-head",
        LABEL_KEYS,
        "for (; r < rows; ++r) short_sums<1>",
        "for (; r + 1 < rows; ++r) short_sums<1>",
        "an odd number of query heads a list",
    ),
    Mutant(
        "labels-are-unsigned",
        LABEL_KEYS,
        "less[r] += q * p.format.middle();",
        "less[r] += 0 * q * p.format.middle();",
        "several query heads a list",
    ),
    Mutant(
        "bounds-of-the-low-alone",
        PAGE_SEARCH,
        "max(x * Vec::load(low + c + i * W), x * Vec::load(high + c + i * W))",
        "x * Vec::load(low + c + i * W)",
        "channels of a query that are above zero",
    ),
    Mutant(
        "bounds-forget-a-head",
        PAGE_SEARCH,
        "for (int64_t row = 1; row < p.rows(); ++row) best",
        "for (int64_t row = 2; row < p.rows(); ++row) best",
        "several query heads a list",
    ),
    Mutant(
        "bounds-of-half-the-sums",
        PAGE_SEARCH,
        "for (int n = kVecs / 2; n > 0; n /= 2)",
        "for (int n = kVecs / 2; n > 1; n /= 2)",
        "more channels than a vector has lanes",
    ),
    Mutant(
        "pages-past-the-length",
        PAGE_SEARCH,
        "tokens = std::min(p.page, length - first);",
        "tokens = p.page;",
        "a length inside a page",
    ),
    Mutant(
        "pages-never-begin-anew",
        "csrc/cpu/selection/page_append.h",
        "slot % p.page == 0 ? bound.set",
        "slot == 0 ? bound.set",
        "a page that was used before",
    ),
    Mutant(
        "window-of-one-page",
        "csrc/common/page_bounds.h",
        "max_of<int64_t>(length - p.window, 0) / p.page",
        "max_of<int64_t>(length - 1, 0) / p.page",
        "a window that touches several pages",
    ),
    Mutant(
        "ties-to-any",
        "csrc/cpu/selection/top_keys.h",
        "fine > fine_edge || (fine == fine_edge && left-- > 0)",
        "fine > fine_edge || (fine == fine_edge && bits % 2 == 0 && left-- > 0)",
        "equal scores at the edge",
    ),
    Mutant(
        "sample-is-believed",
        "csrc/cpu/selection/top_keys.h",
        "    if (reach.high >= take_) {\n      low_ = high;",
        "    if (reach.high >= take_ / 2) {\n      low_ = high;",
        "keys that a bracket leaves out",
    ),
    Mutant(
        "places-behind-the-list",
        "csrc/cpu/selection/top_keys.h",
        "if (end - to < 64) {",
        "if (end - to < 1) {",
        "eight places at a time, over the end of a list",
    ),
    Mutant(
        "pages-in-line-by-the-first-two",
        TILE,
        "for (int64_t i = begin + 1; i * pages_.page < first + count; ++i)",
        "for (int64_t i = begin + 1; i < begin + 2; ++i)",
        "a tile of three pages, of which the first two follow each other in memory",
    ),
    Mutant(
        "last-listed-key-is-the-first",
        TILE,
        "std::fill(list_ + count, list_ + kTileKeys + kListAhead, list_[count - 1]);",
        "std::fill(list_ + count - 1, list_ + kTileKeys + kListAhead, list_[0]);",
        "a last key that lies in another page",
    ),
)
