"""Attention and experts in banks, bit for bit: the reference's products over packed matrices, the processor's rest."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from effops import ops, reference
from effops.nn import MoE
from effops.pim import BankedKVCache, BankLayout, offload
from torch import Tensor

DEVICES = ("neupims", "newton", "duplex", "bank_pim")
HEADS, KV_HEADS, DIM = 6, 2, 32
GROUP = HEADS // KV_HEADS


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def at_the_banks(layout: BankLayout, x: Tensor, matrix: Tensor, sum_values: int | None = None) -> Tensor:
    """x ``[M, K]`` times a matrix ``[N, K]`` of 16-bit values, as units give it: ``[M, N, sums]``."""
    return reference.pim_gemv(
        x.to(matrix.dtype)[None], layout.pack(matrix)[None], len(matrix), sum_values or layout.values, layout.lanes,
        narrow_results=layout.narrow,
    )[0]  # fmt: skip


def added(results: Tensor) -> Tensor:
    """The processor's sum over a bank's rows, one after the other."""
    total = results[..., 0]
    for i in range(1, results.shape[-1]):
        total = total + results[..., i]
    return total


def attention(layout: BankLayout, q: Tensor, k: Tensor, v: Tensor, longest: int, dtype: torch.dtype) -> Tensor:
    """One sequence's decode step, q ``[heads, D]`` over k and v ``[L, G, D]``."""
    length, keys = len(k), k.to(dtype).flatten(1)
    vectors = q.view(KV_HEADS, GROUP, DIM).transpose(0, 1).reshape(GROUP, KV_HEADS * DIM)  # a query of every KV head
    logits = at_the_banks(layout, vectors, keys, sum_values=DIM).permute(2, 0, 1) * DIM**-0.5  # [G, group, L]
    # A row as wide as the longest sequence's: the softmax adds in the order of that.
    weights = F.pad(logits, (0, longest - length), value=-torch.inf).softmax(-1)[..., :length]
    outs = [added(at_the_banks(layout, weights[g], v[:, g].to(dtype).T)) for g in range(KV_HEADS)]
    return torch.cat(outs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", DEVICES)
@torch.inference_mode()
def test_attention_in_banks_has_the_bits_of_its_reference(name: str, dtype: torch.dtype) -> None:
    """Sequences of several lengths, up to three rows of a bank, after a prompt, steps, a reorder and a rollback."""
    layout, lengths = BankLayout.of(name), [1090, 513, 33, 1]
    cache = BankedKVCache(name, 1, 4, 1100, KV_HEADS, DIM, bank_dtype=dtype)
    layer, held = cache.layers[0], [normal(2, n, KV_HEADS, DIM, seed=n) for n in lengths]

    def append(new: list[Tensor]) -> None:
        width = max(x.shape[1] for x in new)
        step = cache.plan(width, [x.shape[1] for x in new])
        layer.append(*torch.stack([F.pad(x, (0, 0, 0, 0, width - x.shape[1], 0)) for x in new], 1), step)
        cache.advance(step)

    append(held)
    for seed in range(3):
        new = [normal(2, 1, KV_HEADS, DIM, seed=100 + 4 * seed + b) for b in range(4)]
        append(new)
        held = [torch.cat(both, 1) for both in zip(held, new, strict=True)]
    order, lengths = [2, 0, 3, 1], [34, 1091, 2, 514]
    cache.reorder(order)
    cache.rollback(lengths)
    held = [held[b][:, :n] for b, n in zip(order, lengths, strict=True)]

    last = [normal(2, 1, KV_HEADS, DIM, seed=200 + b) for b in range(4)]
    held = [torch.cat(both, 1) for both in zip(held, last, strict=True)]
    step = cache.plan(1)
    layer.append(*torch.stack(last, 1), step)
    q = normal(4, 1, HEADS, DIM, seed=300)
    got = layer.attend(q, step)
    expected = [attention(layout, q[b, 0], *held[b], step.max_kv_len, dtype) for b in range(4)]
    assert torch.equal(got[:, 0], torch.stack(expected))


WIDTH = 1100  # three rows of a bank
GELU = {"activation": "gelu", "gated": False}
KINDS = {
    "gated": ({}, lambda h: F.silu(h[:, :WIDTH]) * h[:, WIDTH:]),
    "interleaved": ({"bias": True, "interleaved": True}, lambda h: F.silu(h[:, 0::2]) * h[:, 1::2]),
    "without a gate": ({**GELU, "bias": True}, F.gelu),
}


def expert(layout: BankLayout, moe: MoE, e: int, x: Tensor, act, dtype: torch.dtype) -> Tensor:
    """x ``[n, d]`` through one expert at the banks."""
    for name, after in (("gate_up", act), ("down", lambda y: y)):
        x = added(at_the_banks(layout, x, getattr(moe, f"w_{name}")[e].to(dtype)))
        bias = getattr(moe, f"bias_{name}")
        x = after(x if bias is None else x + bias[e])
    return x


@pytest.mark.parametrize("near", ["all", "some"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name, dtype", [*((name, torch.float16) for name in DEVICES), ("duplex", torch.bfloat16)])
@torch.inference_mode()
def test_experts_in_banks_have_the_bits_of_their_reference(name: str, dtype: torch.dtype, kind: str, near: str) -> None:
    """What the units have is added to what the processor has, an expert after the other, weighted once."""
    options, act = KINDS[kind]
    moe = MoE(64, WIDTH, 6, 3, **options)
    for i, p in enumerate(moe.parameters()):
        p.copy_(normal(*p.shape, seed=i) * 0.2)
    offload(moe, name, dtype=dtype)
    at_banks = [near == "all" or e % 3 > 0 for e in range(6)]
    moe.panels.costs.split_experts = lambda tokens, sizes: at_banks
    layout, x = BankLayout.of(name), normal(9, 64, seed=9)
    got, routing = moe(x), moe.router(x)
    assert {int(e) for e in routing.ids.flatten()} == set(range(6))

    away = torch.where(torch.tensor(at_banks)[routing.ids.long()], -1, routing.ids)
    expected = ops.fused_experts(
        x, moe.w_gate_up, moe.w_down, routing.weights, away, activation=moe.activation,
        interleaved=moe.interleaved, bias_gate_up=moe.bias_gate_up, bias_down=moe.bias_down,
    )  # fmt: skip
    assert near == "some" or not expected.any()
    for e in range(6):
        if at_banks[e]:
            token, place = (routing.ids == e).nonzero(as_tuple=True)
            weight = routing.weights[token, place, None]
            expected[token] = expected[token] + expert(layout, moe, e, x[token], act, dtype) * weight
    assert torch.equal(got, expected)
