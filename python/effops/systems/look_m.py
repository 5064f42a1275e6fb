"""LOOK-M (arXiv 2406.18139): a prompt's cache is compressed once; text stays, what is evicted of images is merged into
what stays.

There is no vision-language model here. Held-out text is measured as the paper's text-only variants, which protect
nothing but the first tokens; images are stood in for by keys and values made for it, patches that are near-duplicates
of a few. Both by how much stays and how it is merged, against eviction without merging and against random eviction.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from effops.cache import KVCache, MergedKVCache, MergedLayer
from effops.cache.merged_layer import MergedStep
from effops.models import Llama
from effops.ops.merging import Merging
from effops.systems import quality, texts
from effops.systems.quality import Measured, NewCache
from effops.systems.report import Curves, Report, Table, Verdict

if TYPE_CHECKING:
    from effops.systems.runner import Run

CLAIM = (
    "a fifth of the keys and values is enough after one look at the prompt, if what goes is merged into what stays; "
    "decoding is up to 1.5 times as fast"
)
UNSEEN = (
    "images and the models that see them, so that nothing is said of the paper's tasks; speed: the keys and values of "
    "so small a model lie in the processor's cache; prompts of tens of thousands of tokens"
)
PROMPT, SCORED, BATCH = 960, 48, 8
SHARES = (0.1, 0.2, 0.4)  # of a prompt that stay: half of them heavy, half recent
PAPER = 0.2
SMALL = 0.05  # nats a token
PATCHES, OBJECTS, TEXT, IMAGES, NOISE = 240, 12, 15, 3, 0.1
KV_HEADS, GROUP, DIM, QUERIES, SAMPLES = 2, 2, 32, 16, 8


@dataclass(frozen=True)
class Variant:
    name: str
    merging: Merging
    random: bool = False


VARIANTS = (
    Variant("pivotal merging", "pivotal"),
    Variant("averaged merging", "averaged"),
    Variant("weighted merging", "weighted"),
    Variant("heaviest, no merging", "none"),
    Variant("random, no merging", "none", random=True),
)


class _RandomLayer(MergedLayer):
    """Keeps entries drawn at random beside the recent and protected ones."""

    generator: torch.Generator

    def _kept(self, mass: Tensor, step: MergedStep) -> Tensor:
        drawn = torch.rand(mass.shape, generator=self.generator)
        return super()._kept(drawn.to(mass), step)


def randomised(cache: MergedKVCache, seed: int = 0) -> MergedKVCache:
    """The same cache with another choice of what stays."""
    generator = torch.Generator().manual_seed(seed)
    layers = []
    for layer in cache.layers:
        own = _RandomLayer(
            layer.k, layer.v, merging=layer.merging, num_sinks=layer.num_sinks, least_similarity=layer.least_similarity
        )
        own.generator = generator
        layers.append(own)
    cache.layers[:] = layers
    return cache


def new_cache_of(model: Llama, variant: Variant, share: float, prompt: int) -> NewCache:
    def new_cache(batch: int, capacity: int) -> KVCache:
        slots = capacity - prompt + max(int(share * prompt), 1) + 4
        cache = model.new_merged_cache(
            batch, capacity, heavy=share / 2, recent=share / 2, merging=variant.merging, slots=slots
        )
        return randomised(cache) if variant.random else cache

    return new_cache


def run(run: Run) -> Report:
    model = run.model
    if model.config.latent is not None:
        raise ValueError(f"look_m: model: expected ordinary attention, got latent attention ({run.name})")
    prompt = min(PROMPT, model.config.context_length - SCORED - 1)
    losses = _losses(run, prompt)
    full = losses[_FULL]
    above = {name: m.above(full) for name, m in losses.items()}
    run.progress("look_m: images")
    errors = {v.name: {share: image_error(v, share) for share in SHARES} for v in VARIANTS}
    verdict, seen = _judged(above, errors, full, prompt)
    exact = above[_ALL][0]
    problems = [] if abs(exact) < 1e-4 else [f"a budget of all tokens is {exact:.2e} nats from the full cache"]
    return Report(
        system="look_m",
        model=run.name,
        claim=CLAIM,
        tables=(_loss_table(losses, above, prompt), _image_table(errors)),
        curves=(
            Curves("held-out loss", "% of the prompt that stays", "nats a token above the full cache",
                   {v.name: [(100 * s, above[_key(v, s)][0]) for s in SHARES] for v in VARIANTS}, {"full cache": 0.0}),
            Curves("images of near-duplicate patches", "% of the prompt that stays", "relative error of attention",
                   {name: [(100 * s, x) for s, x in points.items()] for name, points in errors.items()}),
        ),
        verdict=verdict,
        seen=seen,
        unseen=UNSEEN,
        problems=problems,
    )  # fmt: skip


_FULL, _ALL = "full cache", "pivotal merging, all tokens"


def _key(variant: Variant, share: float) -> str:
    return f"{variant.name}, {share:.0%}"


def _losses(run: Run, prompt: int) -> dict[str, Measured]:
    model = run.model
    caches: dict[str, NewCache] = {
        _FULL: model.new_cache,
        _ALL: lambda batch, capacity: model.new_merged_cache(batch, capacity, heavy=1.0),
    }
    for variant in VARIANTS:
        caches |= {_key(variant, s): new_cache_of(model, variant, s, prompt) for s in SHARES}
    sample = texts.held_out(run.tokenizer, prompt + SCORED + 1)[:BATCH]

    def progress(name: str, done: int, total: int) -> None:
        run.progress(f"look_m: held-out loss, {name}", done, total)

    return quality.continuation_losses(model, caches, sample, prompt, batch=BATCH, own_prompt=True, progress=progress)


def image_prompt(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values [1,T,G,D] of a prompt, and which of its tokens are text, bool [1,T]: text, then images and text
    in turn. A patch is one of OBJECTS of its image and a little noise; those of an object are neighbours."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    parts, text = [], []
    for _ in range(IMAGES):
        objects = draw(2, OBJECTS, KV_HEADS, DIM)
        which = torch.randint(OBJECTS, (PATCHES,), generator=generator).sort().values
        parts += [draw(2, TEXT, KV_HEADS, DIM), objects[:, which] + NOISE * draw(2, PATCHES, KV_HEADS, DIM)]
        text += [True] * TEXT + [False] * PATCHES
    parts.append(draw(2, TEXT, KV_HEADS, DIM))
    k, v = torch.cat(parts, 1)[:, None]
    return k, v, torch.tensor([text + [True] * TEXT])


def image_error(variant: Variant, share: float) -> float:
    """How far attention after a compressed prompt with images lies from that over all of it, relative to its size, over
    QUERIES later tokens of SAMPLES prompts. The share counts text, which is protected."""
    off = size = 0.0
    for seed in range(SAMPLES):
        k, v, text = image_prompt(seed)
        length = k.shape[1]
        generator = torch.Generator().manual_seed(1000 + seed)
        q = torch.randn(1, length + QUERIES, KV_HEADS * GROUP, DIM, generator=generator)
        later = torch.randn(2, 1, QUERIES, KV_HEADS, DIM, generator=generator)
        found = []
        for heavy in (share / 2, 1.0):
            cache = MergedKVCache(
                1, 1, length + QUERIES, KV_HEADS, DIM, heavy=heavy, recent=share / 2, merging=variant.merging
            )
            if variant.random:
                cache = randomised(cache, seed)
            cache.protect(text)
            (layer,) = cache.layers
            for new_k, new_v, rows in ((k, v, q[:, :length]), (later[0], later[1], q[:, length:])):
                step = cache.plan(new_k.shape[1])
                layer.append(new_k, new_v, step)
                out = layer.attend(rows, step)
                cache.advance(step)
            found.append(out)
        off += float((found[0] - found[1]).square().sum())
        size += float(found[1].square().sum())
    return (off / size) ** 0.5


def _judged(
    above: dict[str, tuple[float, float]], errors: dict[str, dict[float, float]], full: Measured, prompt: int
) -> tuple[Verdict, str]:
    """At the paper's budget, a fifth."""
    merged, alone, drawn = (above[_key(VARIANTS[i], PAPER)][0] for i in (0, 3, 4))
    images = [errors[VARIANTS[i].name][PAPER] for i in (0, 3, 4)]
    better = merged < min(alone, drawn), images[0] < min(images[1:])
    verdict: Verdict = "not seen"
    if any(better):
        verdict = "seen" if all(better) and merged < SMALL else "partly seen"
    return verdict, (
        f"where a fifth of {prompt} tokens stays, loss changes by {merged:+.3f} nats a token with pivotal merging, "
        f"{alone:+.3f} if the heaviest stay and nothing is merged, {drawn:+.3f} with random ones (full cache: "
        f"{full.loss:.3f}; small is below {SMALL}); attention over images of near-duplicates is off by "
        f"{images[0]:.3f}, {images[1]:.3f} and {images[2]:.3f} of its size"
    )


def _loss_table(losses: dict[str, Measured], above: dict[str, tuple[float, float]], prompt: int) -> Table:
    full = losses[_FULL]
    rows: list[tuple[str | float | None, ...]] = [(_FULL, 100, full.loss, None, None, full.nbytes / 1e6, full.step_ms)]
    for variant in VARIANTS:
        for share in SHARES:
            measured, (mean, error) = losses[_key(variant, share)], above[_key(variant, share)]
            rows.append(
                (variant.name, int(100 * share), measured.loss, mean, error, measured.nbytes / 1e6, measured.step_ms)
            )
    return Table(
        f"held-out text, {len(full.losses)} files: {SCORED} tokens after {prompt}, one decode step each",
        ("what stays", "% of the prompt", "nats", "above full", "±", "MB held", "ms"),
        rows,
        "nats a token; ±: standard error of the difference over files; MB: keys and values of all sequences; ms: a "
        "step of them. Half of what stays are the last tokens, the first four among the others.",
    )


def _image_table(errors: dict[str, dict[float, float]]) -> Table:
    length = IMAGES * (PATCHES + TEXT) + TEXT
    return Table(
        f"images: {IMAGES} of {PATCHES} patches in {length} tokens, {QUERIES} queries after {SAMPLES} such prompts",
        ("what stays", *(f"{share:.0%}" for share in SHARES)),
        [(name, *points.values()) for name, points in errors.items()],
        f"error of attention's results relative to their size. Keys and values are drawn, a patch is one of {OBJECTS} "
        f"objects of its image with {NOISE:.0%} of noise; all text stays ({TEXT} tokens before each image and at the "
        "end), so that of images there stays what the budget leaves.",
    )
