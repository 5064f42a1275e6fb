"""Hydragen (arXiv 2402.05099): sequences that share a prefix attend to it together, as one matrix product a KV head,
and join it with their own keys by log-sum-exp.

Here `PrefixTreeKVCache` and `cascade_attention`, against the same pages read by each sequence for itself: the same
results, fewer bytes, and how a step's time grows with the prefix and with the batch.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from effops import ops
from effops.cache import PagedKVCache
from effops.systems import texts
from effops.systems.report import Curves, Report, Table

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
TOLERANCE = 1e-3  # of the largest logit, or result
FASTER = 1.1
ENOUGH = 0.5  # seconds
KINDS = ("shared", "each for itself")
LAYER = {"heads": 32, "kv_heads": 8, "dim": 128}  # of an 8B-class model
BATCHES, PREFIXES, SUFFIX = (1, 4, 16, 64), (1024, 4096, 16384), 64
TREE_BATCH, ROOT, BRANCHES, BRANCH = 32, 4096, 4, 2048


def run(run: Run) -> Report:
    """The model's text, a layer's attention by prefix and batch, and a tree of prefixes."""
    found = _on_text(run)
    layer: dict[tuple[int, int], list[float]] = {}
    by_size: list[float] = []
    for i, (batch, prefix) in enumerate(itertools.product(BATCHES, PREFIXES)):
        run.progress("hydragen: one layer's attention", i, len(BATCHES) * len(PREFIXES))
        layer[batch, prefix], error = _compared(_layer_calls(batch, prefix))
        by_size.append(error)
    run.progress("hydragen: a tree")
    seconds, error = _compared(_tree_calls())
    worst = float(torch.tensor(by_size).max())  # NaN if there is one
    errors = {"logits": found["error"], "a layer's results": worst, "a tree's results": error}
    tree = dict(zip(("two levels", "one level", "none"), seconds, strict=True))
    best = max(plain / shared for shared, plain in layer.values())
    most = BATCHES[-1]
    growth = [layer[most, PREFIXES[-1]][i] / layer[most, PREFIXES[0]][i] for i in range(2)]
    problems = [
        f"{name} differ by {error:.2e} of the largest, {TOLERANCE} is allowed"
        for name, error in errors.items()
        if not error <= TOLERANCE
    ]
    return Report(
        system="hydragen",
        model=run.name,
        claim=CLAIM,
        tables=(_text_table(found), _layer_table(layer), _tree_table(tree)),
        curves=(
            Curves(
                f"attention of a layer, prefix of {PREFIXES[1]} tokens", "sequences", "ms a sequence",
                {
                    kind: [(b, layer[b, PREFIXES[1]][i] * 1e3 / b) for b in BATCHES]
                    for i, kind in enumerate(KINDS)
                },
            ),
            Curves(
                f"attention of a layer, {most} sequences", "tokens of the prefix", "ms",
                {kind: [(p, layer[most, p][i] * 1e3) for p in PREFIXES] for i, kind in enumerate(KINDS)},
            ),
        ),
        verdict="partly seen" if best > FASTER and not problems else "not seen",
        seen=(
            f"logits are the same up to {found['error']:.0e} of the largest; a step of {found['batch']:.0f} sequences "
            f"reads {found['mb_shared']:.1f} MB of keys and values instead of {found['mb_alone']:.1f}; attention of a "
            f"layer is up to {best:.1f} times as fast; {PREFIXES[-1] // PREFIXES[0]} times the prefix costs "
            f"{growth[0]:.1f} times the time ({growth[1]:.1f} where each reads it for itself), for products bind here, "
            f"not memory; two levels take {tree['two levels'] / tree['one level']:.2f} of the time of one"
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
    dense = model.new_cache(1, prompt)
    model.hidden_states(files[:1], dense, keep=1)
    found: dict[str, float] = {}
    logits = {}
    for name, cache in caches.items():
        run.progress(f"hydragen: text, {name}")
        step = cache.plan(prompt, lengths=[prompt, *[0] * (batch - 1)])  # the prompt once, in the first sequence
        for filled, layer in zip(dense.layers, cache.layers, strict=True):
            k, v = (x[:, :prompt].expand(batch, -1, -1, -1) for x in (filled.k, filled.v))
            layer.append(k, v, step)
        cache.advance(step)
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
    a_token = caches["alone"].nbytes / (pages * PAGE)
    tail = batch * (OWN + SCORED)
    found["mb_shared"], found["mb_alone"] = ((n * prompt + tail) * a_token / 1e6 for n in (1, batch))
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


def _compared(calls: Sequence[Callable[[], Tensor]]) -> tuple[list[float], float]:
    """Seconds of each, the least of three rounds or more, and the largest difference from the last one's results, in
    parts of their largest."""
    results = [call() for call in calls]
    differences = torch.stack([(x - results[-1]).abs().max() for x in results])
    error = float(differences.max() / results[-1].abs().max())
    seconds = [math.inf] * len(calls)
    start, rounds = time.perf_counter(), 0
    while rounds < 3 or time.perf_counter() - start < ENOUGH:
        rounds += 1
        for i, call in enumerate(calls):
            begin = time.perf_counter()
            call()
            seconds[i] = min(seconds[i], time.perf_counter() - begin)
    return seconds, error


def _levels(pages: tuple[Tensor, Tensor], *groups: tuple[list[list[int]], list[int], int]) -> list[ops.KVLevel]:
    """Of each level: the pages of its groups, the ends of groups in rows, the tokens of each."""
    return [
        ops.KVLevel(*pages, _int32([tokens] * len(table)), _int32([0, *ends]), _int32(table))
        for table, ends, tokens in groups
    ]


def _layer_calls(batch: int, prefix: int) -> list[Callable[[], Tensor]]:
    """A decode step's attention: the prefix read once, and by each."""
    shared, own = prefix // PAGE, SUFFIX // PAGE
    pages = _pages(shared + batch * own, seed=0)
    q = _draw(batch, LAYER["heads"], LAYER["dim"], seed=3)
    mine = [list(range(shared + b * own, shared + (b + 1) * own)) for b in range(batch)]
    levels = _levels(pages, ([list(range(shared))], [batch], prefix), (mine, list(range(1, batch + 1)), SUFFIX))
    table = _int32([[*range(shared), *pages_of] for pages_of in mine])
    lens = _int32([prefix + SUFFIX] * batch)
    return [_cascade(q, levels), _alone(q, pages, table, lens)]


def _cascade(q: Tensor, levels: list[ops.KVLevel]) -> Callable[[], Tensor]:
    return lambda: cast(Tensor, ops.cascade_attention(q, levels))


def _alone(q: Tensor, pages: tuple[Tensor, Tensor], table: Tensor, lens: Tensor) -> Callable[[], Tensor]:
    return lambda: cast(Tensor, ops.paged_attention(q[:, None], *pages, table, lens))[:, 0]


def _tree_calls() -> list[Callable[[], Tensor]]:
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
    return [_cascade(q, two), _cascade(q, one), _alone(q, pages, table, lens)]


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


def _layer_table(layer: dict[tuple[int, int], list[float]]) -> Table:
    rows = [(b, p, shared * 1e3, plain * 1e3, plain / shared) for (b, p), (shared, plain) in layer.items()]
    sizes = f"H = {LAYER['heads']}, G = {LAYER['kv_heads']}, D = {LAYER['dim']}, {SUFFIX} own tokens, float32"
    return Table(
        f"a decode step's attention of one layer: {sizes}",
        ("sequences", "prefix", "ms shared", "ms each", "times as fast"), rows,
    )  # fmt: skip


def _tree_table(tree: dict[str, float]) -> Table:
    title = f"{TREE_BATCH} sequences, {ROOT} tokens of all, {BRANCH} of each of {BRANCHES} branches"
    return Table(title, ("shared", "ms"), [(name, seconds * 1e3) for name, seconds in tree.items()])
