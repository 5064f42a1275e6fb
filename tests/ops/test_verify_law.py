"""The law of what speculative sampling emits: the rules enumerated in fractions, the kernels counted."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
import torch
from backend import NAME
from effops import ops
from effops.reference.speculative import children, deterministic_path, drawn_path, normalised
from strategies.trees import Given, Lazy, outcomes
from strategies.values import int32
from torch import Tensor

SIBLINGS = ("iid", "without_replacement", "deterministic")
CHAIN, STAR, TWO_LEVELS, MIXED = (-1, 0, 1), (-1, 0, 0, 0), (-1, 0, 0, 1, 1, 2), (-1, 0, 1, 0, -2, 0, 1)
Text = tuple[int, ...]
Law = Callable[[Text], list[Any]]


def laws(seed: int, vocab: int, least: int) -> Law:
    """A law of small integers after every text, some of them 0 where ``least`` is."""

    def law(text: Text) -> list[Any]:
        drawn = random.Random(f"{seed} {text}")
        weights = [drawn.randint(least, 4) for _ in range(vocab)]
        weights[drawn.randrange(vocab)] = 5
        return normalised([Fraction(w) for w in weights])

    return law


def step(parents: tuple[int, ...], siblings: str, target: Law, draft: Law, chance: Given, rule: Any = None) -> Text:
    """The tokens that one step emits: drafts come from ``draft``, each drawn when it is first looked at."""

    def text(node: int) -> Text:
        return () if node == 0 else (*text(parents[node]), tokens[node])

    def token(node: int) -> int:
        before = text(parents[node])
        older = [c for c in children(parents, parents[node]) if c < node]
        if siblings == "deterministic":
            return (sum(before) + 2 * len(older)) % len(target(()))  # distinct while there are few
        taken = {tokens[c] for c in older} if siblings == "without_replacement" else set()
        return chance.draws(node, normalised([0 if v in taken else q for v, q in enumerate(draft(before))]))

    tokens = Lazy(token)
    targets, drafts = Lazy(lambda i: target(text(i))), Lazy(lambda i: draft(text(parents[i])))
    if rule is not None:
        path, last = rule(parents, tokens, drafts, targets, chance)
    elif siblings == "deterministic":
        path, last = deterministic_path(parents, tokens, targets, chance)
    else:
        path, last = drawn_path(parents, tokens, drafts, targets, chance, replacement=siblings == "iid")
    return (*(tokens[i] for i in path[1:]), last)


def emitted(*arguments: Any, **options: Any) -> dict[Text, Fraction]:
    found: defaultdict[Text, Fraction] = defaultdict(Fraction)
    for tokens, probability in outcomes(lambda chance: step(*arguments, chance, **options)):
        found[tokens] += probability
    return found


def first_law(found: dict[Text, Fraction], vocab: int) -> list[Fraction]:
    return [sum((p for text, p in found.items() if text[0] == v), Fraction(0)) for v in range(vocab)]


@pytest.mark.parametrize("least", [0, 1])
@pytest.mark.parametrize("tree, vocab", [(CHAIN, 4), (STAR, 4), (TWO_LEVELS, 3), (MIXED, 3)])
@pytest.mark.parametrize("siblings", SIBLINGS)
def test_the_law_is_the_targets(siblings, tree, vocab, least):
    """Exactly: that of the first token, and of each later one given those before."""
    positive = 1 if siblings == "without_replacement" else least  # three siblings need three tokens
    for seed in range(3):
        target, draft = laws(seed, vocab, least), laws(seed + 100, vocab, positive)
        found = emitted(tree, siblings, target, draft)
        assert sum(found.values()) == 1 and first_law(found, vocab) == target(())
        for text in {t[:n] for t in found for n in range(1, len(t))}:
            after = [sum(p for t, p in found.items() if t[: len(text) + 1] == (*text, v)) for v in range(vocab)]
            assert normalised(after) == target(text), text


def wrong(mistake: str) -> Callable[..., Any]:
    """``drawn_path`` with one mistake, for i.i.d. siblings."""

    def rule(parents: Any, tokens: Any, draft: Any, target: Any, chance: Any) -> tuple[list[int], int]:
        path, p, seen = [0], target[0], set()
        while True:
            if mistake != "residual kept for the next level" or len(path) == 1:
                p = target[path[-1]]
            for child in children(parents, path[-1]):
                q, x = draft[child], tokens[child]
                if mistake == "repeated siblings dropped" and (path[-1], x) in seen:
                    continue
                seen.add((path[-1], x))
                tested = target[path[-1]] if mistake == "siblings tested with the old law" else p
                if chance.accepts(child, min(1, tested[x] / q[x])):
                    path.append(child)
                    break
                rest = [max(a - b, 0) for a, b in zip(p, q, strict=True)]
                p = normalised(rest) if sum(rest) > 0 else p
                if mistake == "only the token rejected":
                    p = normalised([0 if v == x else a for v, a in enumerate(target[path[-1]])])
            else:
                end = target[path[-1]] if mistake == "final draw from the old law" else p
                return path, chance.draws(len(parents), end)

    return rule


MISTAKES = ("repeated siblings dropped", "siblings tested with the old law", "residual kept for the next level",
            "only the token rejected", "final draw from the old law")  # fmt: skip
DRAWS = 300_000
TARGET = (
    (0.1, 0.2, 0.3, 0.4),
    (0.7, 0.1, 0.1, 0.1),
    (0.25, 0.25, 0.4, 0.1),
    (0.1, 0.6, 0.2, 0.1),
    (0.3, 0.3, 0.3, 0.1),
)
DRAFT = (
    (0.4, 0.3, 0.2, 0.1),
    (0.1, 0.2, 0.3, 0.4),
    (0.25, 0.25, 0.25, 0.25),
    (0.2, 0.3, 0.4, 0.1),
    (0.1, 0.1, 0.4, 0.4),
)
FOREST = (-1, 0, 0, 0, 1, 2, 2, 3)


def of_table(table: Any) -> Law:
    return lambda text: [Fraction(p).limit_denominator(100) for p in table[text[0] + 1 if text else 0]]


def chi_squares(counts: dict[Text, float], draws: float) -> tuple[float, float]:
    """Of the first token (3 degrees), and of the second given the first (12 degrees)."""
    first = sum(
        (sum(n for t, n in counts.items() if t[0] == v) - draws * p) ** 2 / (draws * p) for v, p in enumerate(TARGET[0])
    )
    second = 0.0
    for a in range(4):
        seen = [sum(n for t, n in counts.items() if t[:2] == (a, v)) for v in range(4)]
        expected = [sum(seen) * p for p in TARGET[a + 1]]
        second += sum((n - e) ** 2 / e for n, e in zip(seen, expected, strict=True) if e > 0)
    return float(first), float(second)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_count_below_would_show(mistake):
    """With expected counts in place of counts, chi-square is the noncentrality: above 100, the limits of the test
    below are passed with probability above 0.9999."""
    found = emitted(FOREST, "iid", of_table(TARGET), of_table(DRAFT), rule=wrong(mistake))
    assert max(chi_squares({t: float(p) * DRAWS for t, p in found.items()}, DRAWS)) > 100


def sampled_tree(siblings: str) -> tuple[Tensor, Tensor, Tensor]:
    """Drafts of FOREST for DRAWS sequences, and their laws."""
    generator = torch.Generator().manual_seed(3)
    target, draft = torch.tensor(TARGET), torch.tensor(DRAFT)
    tokens = torch.full((DRAWS, len(FOREST)), -1)
    for node, parent in enumerate(FOREST[1:], 1):
        law = draft[tokens[:, parent] + 1].clone()
        if siblings == "without_replacement":
            for older in range(1, node):
                if FOREST[older] == parent:
                    law.scatter_(1, tokens[:, older, None], 0.0)
        if siblings == "deterministic":
            tokens[:, node] = (FOREST[:node].count(parent) + tokens[:, parent] + 1) % 4
        else:
            tokens[:, node] = torch.multinomial(law, 1, generator=generator)[:, 0]
    drafted = draft[tokens[:, [max(p, 0) for p in FOREST]] + 1]  # the first sibling's row is the whole law
    return tokens, drafted, target[tokens + 1]


@pytest.mark.core
@pytest.mark.skipif(NAME == "simt", reason="simt: 300 000 sequences are minutes on the host machine")
@pytest.mark.parametrize("siblings", SIBLINGS)
def test_frequencies(siblings):
    """300 000 steps: a right kernel passes 21.1 (3 degrees) and 39.1 (12 degrees) once in 10 000 each. A first token
    off by 0.01 against another has a noncentrality of 175 or more, which is caught with probability above 0.9999; what
    the mistakes above give is asserted there."""
    tokens, drafted, target = sampled_tree(siblings)
    got = ops.verify_rejection(
        int32(*FOREST)[None], tokens, None if siblings == "deterministic" else drafted, target, siblings=siblings,
        generator=torch.Generator().manual_seed(4),
    )  # fmt: skip
    path = tokens.gather(1, got.nodes.clamp_min(0).long())
    texts = path[:, 1:3].scatter(1, (got.count.long()[:, None] - 1).clamp_max(1), got.next_token[:, None])
    texts = torch.where(got.count[:, None] > 2, path[:, 1:3], texts)
    texts[got.count == 1, 1] = -1
    counts = torch.bincount((5 * texts[:, 0] + texts[:, 1] + 1), minlength=20).view(4, 5).tolist()
    first, second = chi_squares(
        {(a, b)[: 1 + (b >= 0)]: counts[a][b + 1] for a in range(4) for b in range(-1, 4)}, DRAWS
    )
    assert first < 21.1 and second < 39.1
