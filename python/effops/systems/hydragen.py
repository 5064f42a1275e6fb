"""Hydragen (arXiv 2402.05099): sequences that share a prefix attend to it together, as one matrix product a KV head,
and join it with their own keys by log-sum-exp.

Here `PrefixTreeKVCache` and `cascade_attention`, against the same pages read by each sequence for itself: the same
results, fewer bytes, and how a step's time grows with the prefix and with the batch.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from effops import ops
from effops.cache import PagedKVCache
from effops.systems import texts
from effops.systems.report import Curves, Report, Table, Verdict

if TYPE_CHECKING:
    from effops.systems.runner import Run

CLAIM = (
    "exact attention; throughput up to 32 times that of the best kernels of its time with large batches and long "
    "shared prefixes; a prefix of 16K instead of 1K tokens costs less than 15 % of throughput, where it cost 90 %; "
    "sharing in a tree saves 55 % more time than in one level"
)
UNSEEN = (
    "the factor of 32, which takes a machine that computes hundreds of products in the time of a byte from memory (two "
    "cores: about five), and hundreds of sequences"
)
PAGE = 16
BATCH, PROMPT, OWN, SCORED = 16, 1024, 32, 24
TOLERANCE = 1e-3  # of the largest logit
LAYER = {"heads": 32, "kv_heads": 8, "dim": 128}  # of an 8B-class model
BATCHES, PREFIXES, SUFFIX = (1, 4, 16, 64), (1024, 4096, 16384), 64
TREE_BATCH, ROOT, BRANCHES, BRANCH = 32, 4096, 4, 2048


def run(run: Run) -> Report:
    texts_seen = _on_text(run)
    run.progress("hydragen: one layer's attention")
    layer = {(b, p): _layer_times(b, p) for b in BATCHES for p in PREFIXES if b in (1, 16, 64) or p == PREFIXES[1]}
    run.progress("hydragen: a tree")
    tree = _tree_times()
    best = max(plain / shared for shared, plain in layer.values())
    growth = {kind: layer[64, 16384][i] / layer[64, 1024][i] for i, kind in enumerate(("shared", "alone"))}
    verdict: Verdict = "partly seen" if best > 1.1 and texts_seen["error"] <= TOLERANCE else "not seen"
    problems = []
    if texts_seen["error"] > TOLERANCE:
        problems.append(f"logits differ by {texts_seen['error']:.2e} of the largest, {TOLERANCE} is allowed")
    if texts_seen["loss_shared"] - texts_seen["loss_alone"] > 1e-4:
        problems.append("held-out loss differs")
    return Report(
        system="hydragen",
        model=run.name,
        claim=CLAIM,
        tables=(_text_table(texts_seen), _layer_table(layer), _tree_table(tree)),
        curves=(
            Curves(
                f"attention of a layer, prefix of {PREFIXES[1]} tokens", "sequences", "ms a token",
                {
                    kind: [(b, layer[b, PREFIXES[1]][i] * 1e3 / b) for b in BATCHES]
                    for i, kind in enumerate(("shared", "each for itself"))
                },
            ),
            Curves(
                "attention of a layer, 64 sequences", "tokens of the prefix", "ms",
                {
                    kind: [(p, layer[64, p][i] * 1e3) for p in PREFIXES]
                    for i, kind in enumerate(("shared", "each for itself"))
                },
            ),
        ),
        verdict=verdict,
        seen=(
            f"logits are the same up to {texts_seen['error']:.0e} of the largest; a step of {BATCH} sequences reads "
            f"{texts_seen['mb_shared']:.1f} MB of keys and values instead of {texts_seen['mb_alone']:.1f}; attention "
            f"of a layer is up to {best:.1f} times as fast; 16 times the prefix costs {growth['shared']:.1f} times the "
            f"time ({growth['alone']:.1f} where each reads it for itself), for products bind here, not memory; two "
            f"levels take {tree['two levels'] / tree['one level']:.2f} of the time of one"
        ),
        unseen=UNSEEN,
        problems=problems,
    )  # fmt: skip


@torch.inference_mode()
def _on_text(run: Run) -> dict[str, float]:
    """A held-out prompt that every sequence shares, then the beginning of another file for each."""
    model = run.model
    prompt = min(PROMPT, model.config.context_length - OWN - SCORED - 1) // PAGE * PAGE
    files = texts.held_out(run.tokenizer, prompt)
    own = texts.held_out(run.tokenizer, OWN + SCORED + 1)[:BATCH]
    batch = len(own)
    pages = prompt // PAGE + batch * (-(-(OWN + SCORED) // PAGE) + 1)
    caches: dict[str, PagedKVCache] = {
        "shared": model.new_prefix_cache(batch, pages, PAGE, min_saved=PAGE),
        "alone": model.new_paged_cache(batch, pages, PAGE),
    }
    found: dict[str, float] = {}
    logits = {}
    for name, cache in caches.items():
        run.progress(f"hydragen: text, {name}")
        model.hidden_states(
            files[:1].expand(batch, -1), cache, lengths=[prompt, *[0] * (batch - 1)], keep=1
        )  # the prompt once, in the first sequence
        for row in range(1, batch):
            cache.fork(0, row)
        model(own[:, :OWN], cache, logits_to_keep=1)
        steps, seconds = [], []
        for i in range(OWN, OWN + SCORED):
            begin = time.perf_counter()
            steps.append(model(own[:, i : i + 1], cache)[:, 0])
            seconds.append(time.perf_counter() - begin)
        logits[name] = torch.stack(steps, 1).float()
        targets = own[:, OWN + 1 : OWN + SCORED + 1]
        found[f"loss_{name}"] = float(torch.nn.functional.cross_entropy(logits[name].flatten(0, 1), targets.flatten()))
        found[f"ms_{name}"] = median(seconds) * 1e3
    row = 2 * model.config.num_hidden_layers * model.config.num_key_value_heads * model.config.head_dim
    row *= model.dtype.itemsize
    tail = batch * (OWN + SCORED)
    found["mb_shared"], found["mb_alone"] = ((n * prompt + tail) * row / 1e6 for n in (1, batch))
    largest = logits["alone"].abs().max()
    found["error"] = float((logits["shared"] - logits["alone"]).abs().max() / largest)
    return found | {"batch": batch, "prompt": prompt}


def _draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _pages(count: int, seed: int) -> tuple[Tensor, Tensor]:
    k, v = (_draw(count, LAYER["kv_heads"], PAGE, LAYER["dim"], seed=seed + i).transpose(1, 2) for i in range(2))
    return k, v


def _int32(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def _time(call: Callable[[], Any], rounds: int = 3) -> float:
    call()
    seconds = []
    for _ in range(rounds):
        begin = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - begin)
    return min(seconds)


def _levels(pages: tuple[Tensor, Tensor], *groups: tuple[list[list[int]], list[int], int]) -> list[ops.KVLevel]:
    """Of each level: the pages of its groups, the ends of groups in rows, the tokens of each."""
    return [
        ops.KVLevel(*pages, _int32([tokens] * len(table)), _int32([0, *ends]), _int32(table))
        for table, ends, tokens in groups
    ]


def _layer_times(batch: int, prefix: int) -> tuple[float, float]:
    """Seconds of a decode step's attention: the prefix read once, and by each."""
    shared, own = prefix // PAGE, SUFFIX // PAGE
    pages = _pages(shared + batch * own, seed=0)
    q = _draw(batch, LAYER["heads"], LAYER["dim"], seed=3)
    mine = [list(range(shared + b * own, shared + (b + 1) * own)) for b in range(batch)]
    levels = _levels(pages, ([list(range(shared))], [batch], prefix), (mine, list(range(1, batch + 1)), SUFFIX))
    table = _int32([[*range(shared), *pages_of] for pages_of in mine])
    lens = _int32([prefix + SUFFIX] * batch)
    return (
        _time(lambda: ops.cascade_attention(q, levels)),
        _time(lambda: ops.paged_attention(q[:, None], *pages, table, lens)),
    )


def _tree_times() -> dict[str, float]:
    """A root that all share, branches that an equal part of the batch shares: both levels, the root alone, none."""
    root, branch, own = ROOT // PAGE, BRANCH // PAGE, SUFFIX // PAGE
    pages = _pages(root + BRANCHES * branch + TREE_BATCH * own, seed=0)
    q = _draw(TREE_BATCH, LAYER["heads"], LAYER["dim"], seed=3)
    each = TREE_BATCH // BRANCHES
    branches = [list(range(root + i * branch, root + (i + 1) * branch)) for i in range(BRANCHES)]
    first = root + BRANCHES * branch
    mine = [list(range(first + b * own, first + (b + 1) * own)) for b in range(TREE_BATCH)]
    alone = list(range(1, TREE_BATCH + 1))
    whole = ([list(range(root))], [TREE_BATCH], ROOT)
    longer = [branches[b // each] + mine[b] for b in range(TREE_BATCH)]
    two = _levels(pages, whole, (branches, [each * (i + 1) for i in range(BRANCHES)], BRANCH), (mine, alone, SUFFIX))
    one = _levels(pages, whole, (longer, alone, BRANCH + SUFFIX))
    table = _int32([[*range(root), *x] for x in longer])
    lens = _int32([ROOT + BRANCH + SUFFIX] * TREE_BATCH)
    return {
        "two levels": _time(lambda: ops.cascade_attention(q, two)),
        "one level": _time(lambda: ops.cascade_attention(q, one)),
        "none": _time(lambda: ops.paged_attention(q[:, None], *pages, table, lens)),
    }


def _text_table(found: dict[str, float]) -> Table:
    rows = [
        (name, found[f"loss_{key}"], found[f"mb_{key}"], found[f"ms_{key}"])
        for key, name in (("shared", "prefix read once"), ("alone", "by each sequence"))
    ]
    title = f"held-out text: {found['batch']:.0f} sequences after a common prompt of {found['prompt']:.0f} tokens"
    return Table(
        title, ("attention", "nats", "MB read", "ms"), rows,
        f"nats a token over {SCORED} decode steps after {OWN} own tokens; MB: keys and values of a step; largest "
        f"difference of logits: {found['error']:.1e} of the largest",
    )  # fmt: skip


def _layer_table(layer: dict[tuple[int, int], tuple[float, float]]) -> Table:
    rows = [(b, p, shared * 1e3, plain * 1e3, plain / shared) for (b, p), (shared, plain) in layer.items()]
    sizes = f"H = {LAYER['heads']}, G = {LAYER['kv_heads']}, D = {LAYER['dim']}, {SUFFIX} own tokens, float32"
    return Table(
        f"a decode step's attention of one layer: {sizes}",
        ("sequences", "prefix", "ms shared", "ms each", "times as fast"), rows,
    )  # fmt: skip


def _tree_table(tree: dict[str, float]) -> Table:
    title = f"{TREE_BATCH} sequences, {ROOT} tokens of all, {BRANCH} of each of {BRANCHES} branches"
    return Table(title, ("shared", "ms"), [(name, seconds * 1e3) for name, seconds in tree.items()])
