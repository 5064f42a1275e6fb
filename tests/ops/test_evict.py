"""``append_evicting``: what it writes, which entry goes, and that nothing else changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from backend import NAME, sized
from effops import ops, reference
from hypothesis import given
from hypothesis import strategies as st
from strategies.attention import DIMS
from strategies.layouts import LAYOUTS, embed, memory
from strategies.values import DTYPES, int32, normal, same_bits
from torch import Tensor

pytestmark = pytest.mark.core
PLACES = st.sampled_from([*LAYOUTS.values(), lambda x: embed(x, [1, 0, *range(2, x.dim())], before=1, behind=2)])


def kept(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def caches(batch: int, heads: int, slots: int, dims: tuple[int, int], dtype: torch.dtype) -> list[Tensor]:
    """k_cache, v_cache, mass, positions; all slots free."""
    kv = [torch.full((batch, slots, heads, d), torch.nan, dtype=dtype) for d in dims]
    return [*kv, torch.full((batch, heads, slots), torch.nan, dtype=kept(dtype)),
            torch.full((batch, heads, slots), -1, dtype=torch.int32)]  # fmt: skip


def append(held: list[Tensor], k: Tensor, v: Tensor, new: Tensor, **options: Any) -> None:
    ops.append_evicting(held[0], held[1], k, v, held[2], held[3], new, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@given(data=st.data())
def test_any_call(dtype, data):
    """Against the reference, compared in all of the memory; entries of any masses and positions, some slots free."""
    batch, tokens, heads = data.draw(st.integers(0, 3)), data.draw(st.integers(0, 5)), data.draw(st.integers(1, 3))
    slots, seed = data.draw(st.sampled_from((1, 2, 5, 9, 300))), data.draw(st.integers(0, 99))
    dims = data.draw(st.sampled_from(DIMS)), data.draw(st.sampled_from(DIMS))
    generator, dt = torch.Generator().manual_seed(seed), DTYPES[dtype]
    plain = caches(batch, heads, slots, dims, dt)
    coarse = data.draw(st.booleans())  # many equal masses
    plain[2] = normal(batch, heads, slots, dtype=kept(dt), seed=seed).abs()
    plain[2] = (plain[2] * 2).round() if coarse else plain[2]
    if plain[2].numel():
        special = data.draw(st.sampled_from((0.0, -0.0, torch.nan, torch.inf)))
        plain[2].view(-1)[seed % plain[2].numel()] = special
    plain[3] = torch.stack([torch.randperm(slots, generator=generator).int() for _ in range(batch * heads)]).view(
        batch, heads, slots) if batch else plain[3]  # fmt: skip
    plain[3][torch.rand(batch, heads, slots, generator=generator) < data.draw(st.sampled_from((0.0, 0.2, 1.0)))] = -1
    new = torch.arange(slots, slots + tokens).int().expand(batch, -1).clone()
    new[torch.rand(batch, tokens, generator=generator) < 0.2] = -1
    options = {"recent": data.draw(st.integers(1, 4)), "num_sinks": data.draw(st.integers(0, 2))}
    k, v = (data.draw(PLACES)(normal(batch, tokens, heads, d, dtype=dt, seed=d)) for d in dims)
    places = [data.draw(PLACES) for _ in range(4)]
    got, expected = ([place(x) for place, x in zip(places, plain, strict=True)] for _ in range(2))
    try:
        reference.append_evicting(*expected[:2], k, v, *expected[2:], new, **options)
    except RuntimeError:
        if NAME == "cuda":
            return  # a GPU drops the token
        before = [memory(x).clone() for x in got]
        with pytest.raises(RuntimeError, match="append_evicting: positions: expected a free slot or an entry that may"):
            append(got, k, v, data.draw(PLACES)(new), **options)
        assert all(torch.equal(memory(a), b) for a, b in zip(got, before, strict=True))
        return
    append(got, k, v, data.draw(PLACES)(new), **options)
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(memory(a), memory(b))


@given(seed=st.integers(0, 99), recent=st.integers(1, 4), num_sinks=st.integers(0, 3), spare=st.integers(0, 3))
def test_sinks_and_recent_tokens_stay(seed, recent, num_sinks, spare):
    """Whatever the masses; every slot holds one token, with its own key."""
    slots, heads = recent + num_sinks + spare, 2
    held = caches(2, heads, slots, (3, 2), torch.float32)
    for i in range(slots + sized(12, 5)):
        new = normal(2, 1, heads, 1, seed=1000 + i).expand(-1, -1, -1, 3)
        append(held, new, new[..., :2], int32(i, i)[:, None], recent=recent, num_sinks=num_sinks)
        for b in range(2):
            for g in range(heads):
                there = [p for p in held[3][b, g].tolist() if p >= 0]
                assert len(there) == len(set(there)) == min(i + 1, slots)
                assert {*range(min(num_sinks, i + 1)), *range(max(0, i + 1 - recent), i + 1)} <= set(there)
                assert held[2][b, g, held[3][b, g].tolist().index(i)] == 0
        held[2].copy_(torch.where(held[3] >= 0, normal(2, heads, slots, seed=seed + i).abs(), torch.nan))
    for b in range(2):
        for g in range(heads):
            for slot, position in enumerate(held[3][b, g].tolist()):
                own = normal(2, 1, heads, 1, seed=1000 + position)[b, 0, g]
                assert held[0][b, slot, g].eq(own).all() and held[1][b, slot, g].eq(own).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_enough_slots_are_a_plain_append(dtype):
    """Masses do not matter until a slot is missing."""
    held = caches(2, 3, 20, (8, 5), DTYPES[dtype])
    plain = [x.clone() for x in held[:2]]
    k, v = (normal(2, 20, 3, d, dtype=DTYPES[dtype], seed=d) for d in (8, 5))
    every = torch.arange(20, dtype=torch.int32).expand(2, 20)
    ops.append_kv(*plain, k, v, every)
    for part in (slice(0, 7), slice(7, 8), slice(8, 20)):
        append(held, k[:, part], v[:, part], every[:, part], recent=1)
        held[2] += held[2].nan_to_num().add(1).flip(-1)
    assert all(same_bits(a, b) for a, b in zip(held[:2], plain, strict=True))
    assert held[3].eq(torch.arange(20)).all()


def full(slots: int = 40) -> list[Tensor]:
    """B 3, G 4, tokens 0 to slots - 1 in any order, some of equal masses."""
    held = caches(3, 4, slots, (4, 4), torch.float32)
    held[0].zero_(), held[1].zero_()
    held[2] = (normal(3, 4, slots).abs() * 3).round()
    order = [torch.randperm(slots, generator=torch.Generator().manual_seed(i)).int() for i in range(12)]
    held[3] = torch.stack(order).view(3, 4, slots)
    return held


@pytest.mark.parametrize("slots", [40, 700])
def test_the_entry_that_goes(slots):
    """The least mass among those that may go; of equals the oldest."""
    held, before = full(slots), full(slots)
    append(held, normal(3, 1, 4, 4), normal(3, 1, 4, 4), int32(*[slots] * 3)[:, None], recent=6, num_sinks=3)
    for b in range(3):
        for g in range(4):
            mass, position = before[2][b, g], before[3][b, g].long()
            may = (position >= 3) & (position <= slots - 6)
            gone = [j for j in range(slots) if held[3][b, g, j] != position[j]]
            assert len(gone) == 1 and held[3][b, g, gone[0]] == slots
            least = mass[may].min()
            assert mass[gone[0]] == least and position[gone[0]] == position[may & (mass == least)].min()


def test_heads_and_sequences_do_not_meet():
    """A head of a sequence does alone what it does among others."""
    k, new = normal(3, 7, 4, 4, seed=3), torch.arange(40, 47, dtype=torch.int32).expand(3, 7).clone()
    new[1, :4] = -1
    together = full()
    append(together, k, k, new, recent=2, num_sinks=2)
    for b in range(3):
        for g in range(4):
            rows, heads = slice(b, b + 1), slice(g, g + 1)
            alone = [x[rows, :, heads].clone() for x in full()[:2]] + [x[rows, heads].clone() for x in full()[2:]]
            append(alone, k[rows, :, heads], k[rows, :, heads], new[rows], recent=2, num_sinks=2)
            for i, (a, whole) in enumerate(zip(alone, together, strict=True)):
                assert same_bits(a, whole[rows, :, heads] if i < 2 else whole[rows, heads])


def test_tokens_together_are_tokens_one_by_one():
    k, new = normal(3, 9, 4, 4, seed=3), torch.arange(40, 49, dtype=torch.int32).expand(3, 9)
    together, single = full(), full()
    append(together, k, k, new, recent=3)
    for t in range(9):
        one = slice(t, t + 1)
        append(single, k[:, one], k[:, one], new[:, one], recent=3)
    assert all(same_bits(a, b) for a, b in zip(together, single, strict=True))


def test_autograd_knows_of_the_write():
    held = full()
    versions = [x._version for x in held]
    append(held, normal(3, 1, 4, 4), normal(3, 1, 4, 4), int32(40, 40, 40)[:, None], recent=1)
    assert [x._version for x in held] == [v + 1 for v in versions]
