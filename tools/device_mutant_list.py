"""The bugs that tools/mutants.py --simt plants in the CUDA kernels, and how the host machine has to name each."""

from __future__ import annotations

from dataclasses import dataclass

from mutant import Mutant


@dataclass(frozen=True)
class DeviceMutant(Mutant):
    """``report`` is a regular expression for the machine's report; empty: wrong numbers alone show it. ``tests`` are
    pytest's arguments."""

    report: str = ""
    tests: tuple[str, ...] = ("tests/ops/test_attention_bounds.py",)


STREAM, BLOCK, SCALAR, LOAD, ROWS, MASK, OUTPUT, FRAGMENTS = (
    f"cuda/attention/{f}.h" for f in ("stream", "block", "scalar", "load", "row_block", "mask", "output", "fragments")
)
BF16 = ("tests/ops/test_attention_bounds.py", "-k", "test_where_the_schedule_changes and bf16")
F32 = ("tests/ops/test_attention_bounds.py", "-k", "test_any_call and f32")
GROUPED, GROUPED_OUTPUT, OPERANDS, GRADIENT, TOKEN, SLOTS = (
    f"cuda/moe/{f}.h"
    for f in ("grouped_tiles", "grouped_output", "operands", "grouped_gradient_tiles", "routing_token", "slot_sort")
)
GROUPS = ("tests/ops/test_grouped.py", "-k", "test_any_call and bf16 or test_sizes and bf16")
DEEP = ("tests/ops/test_grouped.py", "-k", "test_deeper and bf16")
EDGES = ("tests/ops/test_attention_exact.py", "-k", "test_the_mask_at_the_edges and (f32 or bf16)")
LABELS = ("tests/ops/test_labels.py", "-k", "test_any_call or test_exact")
PAGES = ("tests/ops/test_page_bounds.py", "-k", "f32 or numbers")
MASS = ("tests/ops/test_mass.py", "-k", "test_the_rows_that_see_a_key and bf16")
EVICT = ("tests/ops/test_evict.py", "-k", "f32 or together or goes")
MERGE_KV = ("tests/ops/test_merge_kv.py", "-k", "f32 or first")
PACKED = ("tests/ops/test_quantized_linear.py", "-k", "test_any_call and int8")
LISTS = ("tests/ops/test_sparse.py", "-k", "test_any_call and bf16 or test_a_list and bf16")

DEVICE_MUTANTS = (
    DeviceMutant(
        "listed-gaps-seen",
        MASK,
        "return j < b.see.len && b.listed.token(j) >= 0;",
        "return j < b.see.len;",
        "a list with gaps",
        tests=LISTS,
    ),
    DeviceMutant(
        "lists-read-other-keys",
        LOAD,
        "const int64_t g = a.p.kv_share > 1 ? r.g / a.p.kv_share : r.g;",
        "const int64_t g = r.g % (a.p.kv_heads / a.p.kv_share);",
        "a list for each query head",
        tests=LISTS,
    ),
    DeviceMutant(
        "mass-of-hidden-keys",
        "cuda/attention/mass_tiles.h",
        "sum[h] += all || mask.allows(block.rows, block.first + own_key(h)) ? weight : 0;",
        "sum[h] += weight;",
        "any mask",
        tests=MASS,
    ),
    DeviceMutant(
        "mass-of-one-lane",
        "cuda/attention/mass_tiles.h",
        "const float whole = reduce_lanes<4>(sum[h], Sum());",
        "const float whole = sum[h];",
        "any rows",
        tests=MASS,
    ),
    DeviceMutant(
        "evicts-any-of-equals",
        "cuda/cache/evict.cu",
        "(x == mass && at < oldest)",
        "(x == mass && at > oldest)",
        "entries of equal masses, more than a block has threads",
        tests=EVICT,
    ),
    DeviceMutant(
        "evicts-by-mass-alone",
        "cuda/cache/evict.cu",
        "const bool first = lightest && oldest == oldest_of_all;",
        "const bool first = lightest;",
        "entries of equal masses",
        tests=EVICT,
    ),
    DeviceMutant(
        "merges-into-a-lane's-best",
        "cuda/cache/merge_kv.cu",
        "const C most = reduce_lanes<kWarp>(best, Max());",
        "const C most = best;",
        "any kept entries",
        tests=MERGE_KV,
    ),
    DeviceMutant(
        "merges-into-the-last-of-equals",
        "cuda/cache/merge_kv.cu",
        "if (!(product > best)) continue;",
        "if (!(product >= best)) continue;",
        "kept keys that are like none, more than lanes",
        tests=MERGE_KV,
    ),
    DeviceMutant(
        "merges-an-entry-into-itself",
        "cuda/cache/merge_kv.cu",
        "mine < len && mine != slot && nearest",
        "mine < len && nearest",
        "an entry of itself alone, or with others",
        tests=MERGE_KV,
    ),
    DeviceMutant(
        "selected-in-any-order",
        "cuda/selection/select_list.h",
        "write(sinks + before_above + min_of(before_equal, ties), j)",
        "write(sinks + before_above + before_equal, j)",
        "more equal scores than are taken",
        tests=LABELS,
    ),
    DeviceMutant(
        "pages-meet-out-of-order",
        "cuda/selection/page_append.cu",
        "|| page % a.shares != share",
        "|| (a.shares > 1 && t % a.shares != share)",
        "tokens of one page",
        tests=PAGES,
    ),
    DeviceMutant(
        "bounds-of-the-first-head",
        "cuda/selection/page_search.cu",
        "best = row == 0 ? sum : max_of(best, sum);",
        "best = row == 0 ? sum : best;",
        "several query heads a list",
        tests=PAGES,
    ),
    DeviceMutant(
        "selected-without-a-barrier",
        "cuda/selection/select_list.h",
        "  __syncthreads();  // scratch has been read\n",
        "",
        "any selection",
        report="race:",
        tests=LABELS,
    ),
    DeviceMutant(
        "missing-barrier",
        BLOCK,
        "      __syncthreads();  // the keys have been read\n",
        "",
        "two tiles of keys",
        report="race:",
        tests=BF16,
    ),
    DeviceMutant(
        "missing-barrier-scalar",
        SCALAR,
        "        __syncthreads();  // keys and values have been read\n",
        "",
        "two tiles of keys",
        report="race:",
        tests=F32,
    ),
    DeviceMutant(
        "missing-syncwarp",
        SCALAR,
        "    __syncwarp();  // a row's threads share a warp\n",
        "",
        "any call",
        report="race:|uninitialised",
        tests=F32,
    ),
    DeviceMutant(
        "missing-wait",
        STREAM,
        "      copy_wait<kStages - 2>();\n",
        "",
        "any call of few rows",
        report="wait",
        tests=BF16,
    ),
    DeviceMutant(
        "wrong-swizzle",
        FRAGMENTS,
        "offset(row + lane % 8 + lane / 16 * 8, 2 * (step + n) + lane / 8 % 2)",
        "offset(0, 2 * (step + n) + lane / 8 % 2) + (row + lane % 8 + lane / 16 * 8) * (kColumns * 2)",
        "keys written with one swizzle and read with another",
        tests=BF16,
    ),
    DeviceMutant(
        "no-swizzle",
        "cuda/primitives/swizzle.h",
        "((chunk ^ (row / (8 / kSpread) & (kSpread - 1))) * 16)",
        "chunk * 16",
        "the count of bank conflicts alone",
        report="test_tiles_are_read_without_bank_conflicts",
        tests=("tests/ops/test_backend.py", "-k", "bank_conflicts"),
    ),
    DeviceMutant(
        "dropped-tail-tile",
        ROWS,
        "r.last_tile = min_of(r.first_tile + size, tiles);",
        "r.last_tile = min_of(r.first_tile + size, tiles > 1 ? tiles - 1 : tiles);",
        "two tiles of keys",
        tests=BF16,
    ),
    DeviceMutant(
        "off-by-one-mask",
        MASK,
        "last <= b.positions.lowest",
        "last <= b.positions.lowest + 1",
        "causal rows that end one key before a tile does",
        tests=EDGES,
    ),
    DeviceMutant(
        "tail-keys-unmasked",
        BLOCK,
        "if (at >= count || ",
        "if (",
        "sinks apart from the window",
        tests=EDGES,
    ),
    DeviceMutant(
        "missing-rescale",
        BLOCK,
        "o[n][m][e] *= factor[e / 2];",
        "o[n][m][e] *= 1;",
        "a largest score that rises from tile to tile",
        tests=("tests/ops/test_attention_bounds.py", "-k", "test_the_largest_score and bf16"),
    ),
    DeviceMutant(
        "missing-store-predicate",
        BLOCK,
        "      if (r >= block.end) continue;\n",
        "",
        "rows that do not fill a block",
        report="outside|out of bounds",
        tests=BF16,
    ),
    DeviceMutant(
        "keys-past-the-end",
        LOAD,
        "const T* from = r < count ? row(r) : nullptr;",
        "const T* from = row(r);",
        "keys that do not fill a tile",
        report="outside|out of bounds",
        tests=BF16,
    ),
    DeviceMutant(
        "split-lost",
        "cuda/attention/splits.h",
        "for (int i = 0; i < splits; ++i) {\n      const int64_t slot",
        "for (int i = 1; i < splits; ++i) {\n      const int64_t slot",
        "more than four tiles",
        tests=BF16,
    ),
    DeviceMutant(
        "last-row-forgotten",
        STREAM,
        "    if (r < block.rows) {\n      RowSoftmax all;",
        "    if (r + 1 < block.rows) {\n      RowSoftmax all;",
        "any call of few rows",
        tests=BF16,
    ),
    DeviceMutant(
        "grouped-missing-barrier",
        GROUPED,
        "        __syncthreads();  // the step is there, and the one before has been read\n",
        "",
        "any product",
        report="race:|wait",
        tests=GROUPS,
    ),
    DeviceMutant(
        "grouped-missing-wait",
        GROUPED,
        "        copy_wait<kStages - 2>();\n",
        "",
        "any product of aligned rows",
        report="wait",
        tests=GROUPS,
    ),
    DeviceMutant(
        "grouped-stage-too-early",
        GROUPED,
        "load.load(stage == 0 ? kStages - 1 : stage - 1);",
        "load.load(stage == 0 ? kStages - 2 : stage - 1);",
        "more depth than the pipeline is long",
        tests=DEEP,
    ),
    DeviceMutant(
        "grouped-rows-of-the-next-group",
        GROUPED_OUTPUT,
        "if (first_row + row >= tile.rows || feature >= features) continue;",
        "if (feature >= features) continue;",
        "groups that do not fill a tile",
        tests=GROUPS,
    ),
    DeviceMutant(
        "grouped-rows-past-the-end",
        GROUPED,
        "    output.clear(walk.end());\n",
        "",
        "rows past the last group's end",
        tests=GROUPS,
    ),
    DeviceMutant(
        "grouped-weight-fragments-swapped",
        OPERANDS,
        "column / 8 + 2 * n + lane / 16",
        "column / 8 + 2 * n + 1 - lane / 16",
        "any product whose outputs are neighbours in w",
        tests=GROUPS,
    ),
    DeviceMutant(
        "gradient-rows-of-the-next-group",
        GRADIENT,
        "first + line < rows_.end ? count",
        "first + line < p_.rows ? count",
        "two groups with rows",
        tests=("tests/ops/test_grouped.py", "-k", "test_any_weight_gradient and bf16"),
    ),
    DeviceMutant(
        "routing-ties-to-the-last",
        TOKEN,
        "if (!best.before(v, i)) best = {v, i};\n  }\n  return best;",
        "if (v >= best.value) best = {v, i};\n  }\n  return best;",
        "equal logits",
        tests=("tests/ops/test_routing.py", "-k", "test_ties"),
    ),
    DeviceMutant(
        "sort-not-stable",
        SLOTS,
        "__popc(peers & ((1u << lane_index()) - 1))",
        "__popc(peers >> lane_index() >> 1)",
        "an expert with two slots",
        tests=("tests/ops/test_moe_permute.py", "-k", "test_sort"),
    ),
    DeviceMutant(
        "packed-step-of-the-first-group",
        "cuda/gemv/panel.h",
        "return *at(group, group_words_ - 1, feature);",
        "return *at(0, group_words_ - 1, feature);",
        "packed weights of two groups",
        tests=PACKED,
    ),
    DeviceMutant(
        "packed-warps-by-rows-in-any-case",
        "cuda/gemv/packed.cu",
        "a.p.linear.rows <= 8 || a.p.invariant",
        "a.p.linear.rows <= 8",
        "batch_invariant and packed weights",
        tests=("tests/ops/test_quantized_linear.py", "-k", "test_the_batch"),
    ),
    DeviceMutant(
        "packed-panel-as-wide-as-others",
        "cuda/gemv/panel.h",
        "min_of(feature, width_ - 1)",
        "feature",
        "packed weights of 33 output features",
        report="outside|out of bounds",
        tests=PACKED,
    ),
    DeviceMutant(
        "packed-inputs-of-the-next-group",
        "cuda/gemv/panel.h",
        "row < l.rows ? a.p.weight.group - first : 0;",
        "row < l.rows ? a.p.weight.padded_group() - first : 0;",
        "packed weights of 33 inputs",
        report="outside|out of bounds",
        tests=PACKED,
    ),
    DeviceMutant(
        "packed-sums-read-early",
        "cuda/gemv/panel.h",
        "int64_t panel, int width) {\n  __syncthreads();",
        "int64_t panel, int width) {",
        "any packed weight",
        report="race:|uninitialised",
        tests=PACKED,
    ),
    DeviceMutant(
        "bank-values-past-the-length",
        "cuda/pim/gemv.cu",
        "end = last < there ? last : there;",
        "end = last;",
        "a length that is no multiple of a result's values",
        tests=("tests/ops/test_pim_gemv.py",),
    ),
)
