"""``decoder_layer`` and ``decoder``: the bits of the ops they consist of, in every dtype, for few and many rows,
and in the caches."""

from __future__ import annotations

from typing import Any

import effops
import pytest
import torch
from calls import CALLS
from effops import ops, reference
from hypothesis import given
from hypothesis import strategies as st
from strategies.cached import ancestor_bits
from strategies.layouts import LAYOUTS, memory
from strategies.values import DTYPES, int32, normal, same_bits
from torch import Tensor

pytestmark = pytest.mark.core

WIDTH, INNER, DIM, CAPACITY = 24, 20, 8, 40


def call(
    dtype: torch.dtype, batch: int, tokens: int, heads: int, kv_heads: int, biases: bool, window: int
) -> dict[str, Any]:
    """A layer over a cache that holds 5 and 6 keys before the new tokens; sequence 1 is padded on the left."""
    shapes = {"qkv": ((heads + 2 * kv_heads) * DIM, WIDTH), "o": (WIDTH, heads * DIM), "gate_up": (2 * INNER, WIDTH),
              "down": (WIDTH, INNER)}  # fmt: skip
    weights = {n: normal(*shape, dtype=dtype, seed=i) / shape[1] ** 0.5 for i, (n, shape) in enumerate(shapes.items())}
    given = {f"{n}_bias": normal(s[0], dtype=dtype, seed=9) if biases else None for n, s in shapes.items()}
    norms = {n: normal(WIDTH, dtype=dtype, seed=len(n)) for n in ("attention_norm", "mlp_norm")}
    padding = [0, min(2, tokens)][:batch]
    slots = [[-1] * n + list(range(5 + b, 5 + b + tokens - n)) for b, n in enumerate(padding)]
    places = torch.tensor(slots, dtype=torch.int32).view(batch, tokens)
    angles = 3 * normal(50, DIM // 2, seed=7)
    caches = {
        n: normal(batch, CAPACITY, kv_heads, DIM, dtype=dtype, seed=i) for i, n in enumerate(("k_cache", "v_cache"))
    }
    return {
        "x": normal(batch, tokens, WIDTH, dtype=dtype), **weights, **given, **norms, "cos": angles.cos(),
        "sin": angles.sin(), "positions": places.clamp(min=0), **caches, "slots": places,
        "kv_lens": int32(*[5 + b + tokens - n for b, n in enumerate(padding)]), "norm_eps": 1e-4, "window": window,
        "max_kv_len": 6 + tokens,
    }  # fmt: skip


def in_pages(c: dict[str, Any], page: int) -> dict[str, Any]:
    """The same call over caches in pages, that lie in another order."""
    batch, entries = c["x"].shape[0], CAPACITY // page
    table = torch.arange(batch * entries, dtype=torch.int32).flip(0).view(batch, entries)
    pages = {n: c[n].unflatten(1, (entries, page)).flatten(0, 1).flip(0) for n in ("k_cache", "v_cache")}
    return c | pages | {"page_table": table}


def with_trees(c: dict[str, Any]) -> dict[str, Any]:
    """Trees in place of consecutive tokens: two branches from the first node."""
    batch, tokens, _ = c["x"].shape
    parents = [-1, *(max(0, i - 2) for i in range(1, tokens))]
    bits = ancestor_bits(parents)
    depths = (reference.tree_mask(bits).sum(-1) - 1).int()
    first = torch.arange(5, 5 + batch, dtype=torch.int32)[:, None]
    places = {"positions": first + depths, "slots": first + torch.arange(tokens, dtype=torch.int32)}
    return c | places | {"kv_lens": (first[:, 0] + tokens), "ancestors": bits[None], "depths": depths[None]}


def packed(c: dict[str, Any], formats: dict[str, str]) -> dict[str, Any]:
    """With the named weights in few bits."""
    return c | {name: ops.pack_weight(c[name], format).data for name, format in formats.items()}


def drawn_formats(data: st.DataObject, dtype: str) -> dict[str, str]:
    if dtype == "f64":
        return {}
    formats = st.sampled_from(("int8", "int4", "fp8_e4m3"))
    return data.draw(st.dictionaries(st.sampled_from(("qkv", "o", "gate_up", "down")), formats))


def by_parts(c: dict[str, Any]) -> Tensor:
    heads = ops.packed_linear(c["x"], c["qkv"], c["qkv_bias"], norm=c["attention_norm"], norm_eps=c["norm_eps"])
    heads = heads.unflatten(2, (-1, c["k_cache"].shape[3]))
    caches = c["k_cache"], c["v_cache"]
    table, lens, window = c.get("page_table"), c["kv_lens"], c["window"]
    q = ops.rotary_append(heads, c["cos"], c["sin"], c["positions"], *caches, c["slots"], page_table=table)
    if "ancestors" in c:
        tree = {"depths": c["depths"], "kv_lens": lens, "page_table": table, "window": window}
        mixed = ops.tree_attention(q, *caches, c["ancestors"], **tree)
    elif table is not None:
        mixed = ops.paged_attention(q, *caches, table, lens, causal=True, window=window)
    else:
        mixed = ops.attention(q, *caches, kv_lens=lens, causal=True, window=window)
    y = ops.packed_linear(mixed.flatten(2), c["o"], c["o_bias"], residual=c["x"])
    hidden = ops.packed_linear(y, c["gate_up"], c["gate_up_bias"], norm=c["mlp_norm"], norm_eps=c["norm_eps"])
    return ops.packed_linear(hidden, c["down"], c["down_bias"], residual=y, gated=True)


@pytest.mark.parametrize("dtype", DTYPES)
@given(data=st.data())
def test_has_the_bits_of_its_parts(dtype, data):
    batch, tokens = data.draw(st.integers(0, 2)), data.draw(st.sampled_from((1, 2, 3, 7, 20)))
    kv_heads, group = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 4))
    window = data.draw(st.sampled_from((0, 0, 3)))
    c = call(DTYPES[dtype], batch, tokens, kv_heads * group, kv_heads, data.draw(st.booleans()), window)
    if data.draw(st.booleans()):
        c = with_trees(c)
    if data.draw(st.booleans()):
        c = in_pages(c, data.draw(st.sampled_from((1, 5, 8, 20))))
    places = {n: LAYOUTS[data.draw(st.sampled_from(list(LAYOUTS)))] for n, x in c.items() if isinstance(x, Tensor)}
    formats = drawn_formats(data, dtype)
    c, places = packed(c, formats), {n: place for n, place in places.items() if n not in formats}
    mine, theirs = (c | {n: place(c[n]) for n, place in places.items()} for _ in range(2))
    torch.set_num_threads(data.draw(st.sampled_from((1, 2))))
    got, expected = ops.decoder_layer(**mine), by_parts(theirs)
    assert same_bits(got, expected) and got.is_contiguous()
    for cache in ("k_cache", "v_cache"):
        assert torch.equal(memory(mine[cache]), memory(theirs[cache]))


@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("tree", [False, True])
def test_agrees_with_the_reference(tree, paged):
    for tokens in (1, 20):
        mine, theirs = (call(torch.float64, 2, tokens, 4, 2, True, 0) for _ in range(2))
        if tree:
            mine, theirs = with_trees(mine), with_trees(theirs)
        if paged:
            mine, theirs = in_pages(mine, 8), in_pages(theirs, 8)
        got, expected = ops.decoder_layer(**mine), reference.decoder_layer(**theirs)
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(mine["k_cache"], theirs["k_cache"], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["positions", "slots", "kv_lens", "down", "o_bias"])
def test_bad_arguments_write_nothing(name):
    c = CALLS["decoder_layer"]()
    before = [c[n].clone() for n in ("k_cache", "v_cache")]
    bad = c[name] + 100 if c[name].dtype == torch.int32 else c[name][1:]
    with pytest.raises(RuntimeError, match=f"decoder_layer: {name}: expected .+, got"):
        ops.decoder_layer(**c | {name: bad})
    assert all(same_bits(c[n], x) for n, x in zip(("k_cache", "v_cache"), before, strict=True))


def test_bad_packed_weights_are_refused():
    c = call(torch.float32, 2, 2, 4, 2, False, 0)
    for name in ("qkv", "o", "gate_up", "down"):
        good = ops.pack_weight(c[name], "int8").data
        ops.decoder_layer(**c | {name: good})
        for bad in (good[1:], good[:, :-1], good[:, 1:], good.view(torch.uint8), good[:, None]):
            with pytest.raises(RuntimeError, match=f"decoder_layer: {name}: expected .+, got"):
                ops.decoder_layer(**c | {name: bad})


def test_autograd_knows_of_the_write():
    c = call(torch.float32, 2, 2, 4, 2, False, 0)
    for count, write in enumerate((ops.decoder_layer, torch.ops.effops.decoder_layer, ops.decoder_layer), 1):
        write(**c)
        assert c["k_cache"]._version == c["v_cache"]._version == count


LISTS = [f"{n}{b}" for n in ("qkv", "o", "gate_up", "down") for b in ("", "_bias")] + ["attention_norm", "mlp_norm"]
WORDS, LOGITS = 11, 70


@pytest.mark.parametrize("formats", ({}, {"qkv": "int4", "o": "int8", "gate_up": "fp8_e4m3", "down": "int4"}))
@pytest.mark.parametrize("batch", (3, 20))
def test_the_batch_does_not_matter(batch, formats):
    """Under batch_invariant a sequence alone has the bits that it has among others."""
    one = packed(call(torch.float32, 1, 1, 4, 2, True, 0), formats)
    every = ("x", "k_cache", "v_cache", "positions", "slots", "kv_lens")
    many = one | {name: one[name].repeat(batch, *[1] * (one[name].dim() - 1)) for name in every}
    many["x"] = normal(batch, 1, WIDTH)
    with effops.batch_invariant():
        together = ops.decoder_layer(**many)
        for b in range(batch):
            own = {name: one[name].clone() for name in every} | {"x": many["x"][b : b + 1]}
            assert same_bits(ops.decoder_layer(**one | own), together[b : b + 1])


def whole(calls: list[dict[str, Any]]) -> dict[str, Any]:
    """One call of all these layers, which share what is not weight or cache, between an embedding and an LM head."""
    lists = {n: [c[n] for c in calls if c[n] is not None] for n in LISTS}
    caches = {n: torch.stack([c[n] for c in calls]) for n in ("k_cache", "v_cache")}
    batch, tokens, _ = calls[0]["x"].shape
    embedding, norm, lm_head = (normal(*shape, dtype=calls[0]["x"].dtype, seed=i) for i, shape in
                                enumerate(((WORDS, WIDTH), (WIDTH,), (LOGITS, WIDTH))))  # fmt: skip
    ends = {"tokens": torch.arange(batch * tokens).view(batch, tokens) * 7 % WORDS, "embedding": embedding,
            "norm": norm, "lm_head": lm_head, "windows": [c["window"] for c in calls]}  # fmt: skip
    return {n: x for n, x in calls[0].items() if n not in ("window", "x")} | lists | caches | ends


@pytest.mark.parametrize("dtype", DTYPES)
@given(data=st.data())
def test_decoder_has_the_bits_of_its_ops(dtype, data):
    batch, tokens = data.draw(st.integers(0, 2)), data.draw(st.sampled_from((1, 2, 3, 7, 20)))
    heads, biases, count = data.draw(st.sampled_from((1, 2, 4))), data.draw(st.booleans()), data.draw(st.integers(1, 3))
    windows = [data.draw(st.sampled_from((0, 3))) for _ in range(count)]
    calls = [call(DTYPES[dtype], batch, tokens, heads, 1, biases, w) for w in windows]
    for i, c in enumerate(calls):
        c.update({n: c[n] * (1 + i / 4) for n in ("qkv", "down", "k_cache")})
    if data.draw(st.booleans()):
        calls = [with_trees(c) for c in calls]
    if data.draw(st.booleans()):
        calls = [in_pages(c, 8) for c in calls]
    formats = drawn_formats(data, dtype)
    calls[-1] = packed(calls[-1], formats)
    mine = whole(calls)
    if dtype != "f64" and data.draw(st.booleans()):
        mine = packed(mine, {"lm_head": "int8"})
    for name in LISTS:  # any strides
        place = LAYOUTS[data.draw(st.sampled_from(list(LAYOUTS)))]
        if mine[name] and name not in formats and data.draw(st.booleans()):
            mine[name][-1] = place(mine[name][-1])
    torch.set_num_threads(data.draw(st.sampled_from((1, 2))))
    hidden, logits = ops.decoder(**mine)
    x = mine["embedding"][mine["tokens"]]
    for c in calls:
        x = ops.decoder_layer(**c | {"x": x})
    normed = ops.rms_norm(x, mine["norm"], mine["norm_eps"])
    assert same_bits(hidden, normed) and same_bits(logits, ops.packed_linear(normed, mine["lm_head"]))
    for cache in ("k_cache", "v_cache"):
        assert same_bits(mine[cache], torch.stack([c[cache] for c in calls]))


@pytest.mark.parametrize("tokens", [1, 20])
def test_decoder_agrees_with_the_reference(tokens):
    mine, theirs = (whole([call(torch.float64, 2, tokens, 4, 2, b, 3 * b) for b in (1, 1)]) for _ in range(2))
    for got, expected in zip(ops.decoder(**mine), reference.decoder(**theirs), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(mine["v_cache"], theirs["v_cache"], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", LISTS)
def test_a_bad_weight_of_a_later_layer_writes_nothing(name):
    c = CALLS["decoder"]()
    before = [c[n].clone() for n in ("k_cache", "v_cache")]
    for bad in (c[name][1][1:], c[name][1].double(), c[name][1][None]):
        with pytest.raises(RuntimeError, match=f"decoder: {name}: expected .+, got"):
            ops.decoder(**c | {name: [c[name][0], bad]})
    with pytest.raises(RuntimeError, match=rf"decoder: {name}\[1\]: expected .+ does not require grad, got one"):
        ops.decoder(**c | {name: [c[name][0], c[name][1].clone().requires_grad_()]})
    with pytest.raises(RuntimeError, match=rf"decoder: {name}\[1\]: expected the device of tokens, cpu, got meta"):
        ops.decoder(**c | {name: [c[name][0], c[name][1].to("meta")]})
    assert all(same_bits(c[n], x) for n, x in zip(("k_cache", "v_cache"), before, strict=True))
