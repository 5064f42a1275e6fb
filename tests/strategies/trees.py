"""Token trees, and every way a random rule can go."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from typing import Any

import torch
from hypothesis import strategies as st

from strategies.values import same_bits


@st.composite
def trees(draw: st.DrawFn, most: int = 9, widest: int = 3, padding: bool = True) -> list[int]:
    """Parents of 1 to ``most`` nodes with up to ``widest`` children each, padding anywhere after the root."""
    parents = [-1]
    for _ in range(draw(st.integers(0, most - 1))):
        free = [i for i, p in enumerate(parents) if p != -2 and parents.count(i) < widest]
        parents.append(draw(st.sampled_from(free + [-2] * padding)))
    return parents


class Given:
    """Decisions taken from a script as far as it goes, then the first that is possible; the others are noted."""

    def __init__(self, script: list[int]) -> None:
        self.script, self.taken, self.probability = script, [], Fraction(1)
        self.others: list[list[int]] = []

    def _choose(self, law: Sequence[Any]) -> int:
        possible = [i for i, p in enumerate(law) if p > 0]
        if len(self.taken) < len(self.script):
            chosen = self.script[len(self.taken)]
        else:
            chosen = possible[0]
            self.others += [[*self.taken, other] for other in possible[1:]]
        self.taken.append(chosen)
        self.probability *= law[chosen]
        return chosen

    def accepts(self, node: int, probability: Any) -> bool:
        return self._choose([1 - probability, probability]) == 1

    def draws(self, place: int, law: Sequence[Any]) -> int:
        return self._choose(law)


def outcomes(rule: Callable[[Given], Any]) -> Iterator[tuple[Any, Fraction]]:
    """The result and the exact probability of every way that ``rule(chance)`` can go."""
    scripts: list[list[int]] = [[]]
    while scripts:
        chance = Given(scripts.pop())
        yield rule(chance), chance.probability
        scripts += chance.others


class Lazy:
    """A sequence whose entries are computed when they are first asked for."""

    def __init__(self, entry: Callable[[int], Any]) -> None:
        self.entry, self.known = entry, {}

    def __getitem__(self, i: int) -> Any:
        if i not in self.known:
            self.known[i] = self.entry(i)
        return self.known[i]


def draw_uniforms(data: st.DataObject, count: int) -> list[float]:
    return torch.rand(count, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))).tolist()


def equal(got: Any, expected: Any) -> bool:
    return all(same_bits(a, b) for a, b in zip(got, expected, strict=True))


def check(got: Any, path: list[int], token: int, nodes: int) -> None:
    assert got.nodes.tolist() == [path + [-1] * (nodes - len(path))]
    assert got.count.tolist() == [len(path)] and got.next_token.tolist() == [token]
