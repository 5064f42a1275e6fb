"""``accumulate_mass``: within its bound on any call, exact where weights are whole numbers, and the laws that tie it to
attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from backend import NAME, sized
from effops import ops, reference
from effops.reference.bounds import attention_bound
from effops.reference.eviction_bounds import accumulate_mass_bound
from hypothesis import given
from hypothesis import strategies as st
from strategies.attention import dense
from strategies.cached import OUT_OF_RANGE
from strategies.layouts import LAYOUTS
from strategies.values import DTYPES, int32, normal, same_bits
from torch import Tensor

pytestmark = [pytest.mark.core, pytest.mark.attention]
MASKS = ("kv_lens", "kv_starts", "causal", "window", "num_sinks", "softcap", "scale")


def kept(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def existing(options: dict[str, Any], batch: int, capacity: int) -> Tensor:
    """bool [B, L]"""
    end, start = options.get("kv_lens"), options.get("kv_starts")
    j = torch.arange(capacity).expand(batch, -1)
    return (j >= (0 if start is None else start[:, None])) & (j < (capacity if end is None else end[:, None]))


@pytest.mark.parametrize("dtype", DTYPES)
@given(data=st.data())
def test_any_call(dtype, data):
    """What no sequence has is neither read nor written."""
    case = data.draw(dense(DTYPES[dtype]))
    (q, k, v), options = case.tensors, dict(case.options)
    del options["prefix_lens"]
    options.pop("head_windows", None)
    _, lse = ops.attention(q, k, v, return_lse=True, **options)
    masks = {name: options[name] for name in MASKS if name in options}
    batch, capacity, kv_heads = k.shape[:3]
    exists = existing(masks, batch, capacity)[:, None].expand(-1, kv_heads, -1)
    before = normal(batch, kv_heads, capacity, dtype=kept(q.dtype), seed=5).abs().masked_fill(~exists, torch.nan)
    layout = st.sampled_from(list(LAYOUTS)).map(LAYOUTS.__getitem__)
    mass = data.draw(layout)(before)
    ops.accumulate_mass(mass, q, k, data.draw(layout)(lse), **masks)
    bound = accumulate_mass_bound(before, q, k, lse, **masks)
    assert type(bound)(*(x[exists] for x in bound)).worst(mass[exists]) <= 1
    assert mass[~exists].isnan().all()


@pytest.mark.parametrize("tokens", [1, 5, 70])
@pytest.mark.parametrize("dtype", DTYPES)
@given(data=st.data())
def test_the_rows_that_see_a_key(dtype, tokens, data):
    """Scores and lse of 0 make every weight 1: masses are numbers of rows, exactly."""
    capacity = data.draw(st.sampled_from((1, 63, 64, 65, 200, sized(1300, 300))))
    options: dict[str, Any] = {
        "causal": data.draw(st.booleans()), "window": data.draw(st.sampled_from((0, 1, 3, 64, 100))),
        "num_sinks": data.draw(st.sampled_from((0, 2, 70))),
        "kv_lens": int32(capacity, data.draw(st.integers(0, capacity))),
        "kv_starts": int32(data.draw(st.integers(0, capacity)), 0),
    }  # fmt: skip
    q, k = torch.zeros(2, tokens, 6, 16, dtype=DTYPES[dtype]), normal(2, capacity, 2, 16, dtype=DTYPES[dtype])
    mass = torch.zeros(2, 2, capacity, dtype=kept(q.dtype))
    ops.accumulate_mass(mass, q, k, torch.zeros(2, tokens, 6, dtype=mass.dtype), **options)
    named = {"kv_starts": options["kv_starts"], "causal": options["causal"], "num_sinks": options["num_sinks"]}
    windows = torch.tensor([options["window"]])
    allowed = reference.allowed_keys(tokens, capacity, options["kv_lens"].long(), windows=windows, **named)
    assert torch.equal(mass, 3 * allowed.sum(2).expand(-1, 2, -1).to(mass.dtype))


def inputs(dtype: torch.dtype, tokens: int, length: int = 700) -> tuple[Tensor, Tensor, Tensor]:
    return (normal(2, tokens, 6, 40, dtype=dtype), normal(2, length, 2, 40, dtype=dtype, seed=1),
            normal(2, length, 2, 8, dtype=dtype, seed=2))  # fmt: skip


def mass_of(q: Tensor, k: Tensor, lse: Tensor, **options: Any) -> Tensor:
    mass = torch.zeros(q.shape[0], k.shape[2], k.shape[1], dtype=kept(q.dtype))
    ops.accumulate_mass(mass, q, k, lse, **options)
    return mass


@pytest.mark.parametrize("tokens", [1, 33])
@pytest.mark.parametrize("dtype", DTYPES)
def test_it_is_the_sum_of_attentions_weights(dtype, tokens):
    """Attention to values that are unit vectors shows its weights."""
    length = 100
    q, k, v = inputs(DTYPES[dtype], tokens, length)
    v = torch.eye(length, dtype=q.dtype)[None, :, None].expand(2, -1, 2, -1)
    options: dict[str, Any] = {"causal": True, "kv_lens": int32(100, 61), "softcap": 4.0}
    out, lse = ops.attention(q, k, v, return_lse=True, **options)
    bound = accumulate_mass_bound(torch.zeros(2, 2, length), q, k, lse, **options)
    own, own_lse = attention_bound(q, k, v, **options)
    off = own.error + own.value * torch.expm1(own_lse.error)[..., None]
    weights, errors = (x.unflatten(2, (2, 3)).sum((1, 3)) for x in (out.double(), off))
    exists = existing(options, 2, length)[:, None].expand(-1, 2, -1)
    assert ((weights - mass_of(q, k, lse, **options)).abs() <= bound.error + errors)[exists].all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_steps_add_up_to_a_prompt(dtype):
    """Causal rows pass one by one, or together."""
    tokens, length = sized(60, 20), 130
    q, k, v = inputs(DTYPES[dtype], tokens, length)
    _, lse = ops.attention(q, k, v, causal=True, return_lse=True)
    whole, steps = mass_of(q, k, lse, causal=True), torch.zeros(2, 2, length, dtype=kept(q.dtype))
    for i in range(tokens):
        lens = int32(*[length - tokens + i + 1] * 2)
        ops.accumulate_mass(steps, q[:, i : i + 1], k, lse[:, i : i + 1], kv_lens=lens, causal=True)
    bound = accumulate_mass_bound(torch.zeros_like(steps), q, k, lse, causal=True)
    assert bound.worst(whole) <= 1 and bound._replace(value=whole.double()).worst(steps) <= 2


@pytest.mark.parametrize("tokens", [1, 50])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_bits_alone_in_a_batch_and_with_other_threads(dtype, tokens):
    q, k, v = inputs(DTYPES[dtype], tokens)
    options: dict[str, Any] = {"causal": True, "kv_lens": int32(690, 333), "kv_starts": int32(0, 5)}
    _, lse = ops.attention(q, k, v, return_lse=True, **options)
    got = mass_of(q, k, lse, **options)
    for b in range(2):
        own = slice(b, b + 1)
        alone = {"causal": True, "kv_lens": options["kv_lens"][own], "kv_starts": options["kv_starts"][own]}
        assert same_bits(mass_of(q[own], k[own], lse[own], **alone), got[own])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert same_bits(mass_of(q, k, lse, **options), got)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("tokens", [1, 50])
@pytest.mark.parametrize("page", [1, 7, 64])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_bits_of_the_dense_cache(dtype, page, tokens):
    """Out of pages, wherever they lie; entries without a key are never read."""
    length = sized(700, 150)
    q, k, v = inputs(DTYPES[dtype], tokens, length)
    options: dict[str, Any] = {"causal": True, "kv_lens": int32(length - 10, 73), "kv_starts": int32(3, 0)}
    _, lse = ops.attention(q, k, v, return_lse=True, **options)
    expected = mass_of(q, k, lse, **options)
    entries = -(-length // page)
    table = torch.randperm(2 * entries, generator=torch.Generator().manual_seed(page)).int().view(2, entries)
    pages = torch.full((2 * entries, page, 2, 40), torch.nan, dtype=k.dtype)
    padded = torch.nn.functional.pad(k, (0, 0, 0, 0, 0, entries * page - length))
    pages[table.flatten().long()] = padded.view(2 * entries, page, 2, 40)
    table[1, -(-73 // page) :] = OUT_OF_RANGE
    for placed in (table, table[:, None].expand(2, 2, entries)):
        mass = torch.zeros(2, 2, entries * page, dtype=expected.dtype)
        ops.accumulate_mass(mass, q, pages, lse, page_table=placed, **options)
        assert same_bits(mass[..., :length], expected) and mass[..., length:].eq(0).all()


@pytest.mark.parametrize("tokens", [3, 50])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_minus_infinity_add_nothing(dtype, tokens):
    q, k, v = inputs(DTYPES[dtype], tokens, 130)
    _, lse = ops.attention(q, k, v, return_lse=True)
    left_out = lse.clone()
    left_out[:, : tokens - 2] = -torch.inf
    bound = accumulate_mass_bound(torch.zeros(2, 2, 130), q[:, -2:], k, lse[:, -2:])
    assert bound.worst(mass_of(q, k, left_out)) <= 2
    assert mass_of(q, k, torch.full_like(lse, -torch.inf)).eq(0).all()


def test_nothing_to_add():
    q, k, _ = inputs(torch.float32, 2, 9)
    lse, mass = torch.zeros(2, 2, 6), normal(2, 2, 9)
    before = mass.clone()
    ops.accumulate_mass(mass, q[:, :0], k, lse[:, :0])
    ops.accumulate_mass(mass, q, k, lse, kv_lens=int32(0, 0))
    ops.accumulate_mass(mass[:0], q[:0], k[:0], lse[:0])
    ops.accumulate_mass(mass[..., :0], q, k[:, :0], lse)
    assert same_bits(mass, before)


@pytest.mark.skipif(NAME == "cuda", reason="a GPU checks index values with EFFOPS_CHECK=1 alone")
def test_pages_out_of_range():
    q, k, _ = inputs(torch.float32, 1, 8)
    mass, table = torch.zeros(2, 2, 16), int32(0, 1, 2, 1).view(2, 2)
    with pytest.raises(
        RuntimeError, match=r"accumulate_mass: page_table: expected pages in \[0, 2\), got 2 at entry 0"
    ):
        ops.accumulate_mass(mass, q, k, torch.zeros(2, 1, 6), kv_lens=int32(16, 9), page_table=table)
    with pytest.raises(RuntimeError, match="accumulate_mass: kv_lens: expected a tensor beside page_table, got None"):
        ops.accumulate_mass(mass, q, k, torch.zeros(2, 1, 6), page_table=table)
