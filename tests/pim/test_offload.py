"""Layouts, and modules and caches in banks: nothing lost, the bits of the bank-ordered reference, close to dense."""

from __future__ import annotations

import pytest
import torch
from effops import nn as effnn
from effops import reference
from effops.models import Llama, Mixtral, ModelConfig
from effops.nn import MoE
from effops.pim import BankedKVCache, BankLayout, Device, PimLinear, offload
from effops.pim.costs import Costs
from hypothesis import given, settings
from hypothesis import strategies as st

DEVICES = ("neupims", "newton", "duplex", "bank_pim")
HALF = torch.finfo(torch.float16).eps / 2


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=30)
@given(st.sampled_from(DEVICES), st.integers(1, 700), st.integers(1, 1300))
def test_packing_loses_nothing(name: str, n: int, k: int) -> None:
    layout, matrix = BankLayout.of(name), normal(n, k).half()
    banks = layout.pack(matrix)
    assert torch.equal(layout.unpack(banks, n, k), matrix)
    for row, column in ((0, 0), (n - 1, k - 1), (n // 2, k // 3)):
        tile, unit = divmod(row, layout.units)
        chunk, place = divmod(column, layout.values)
        assert banks[tile, chunk, unit, place] == matrix[row, column]
    assert int((banks != 0).sum()) == int((matrix != 0).sum())


@pytest.mark.parametrize("name", DEVICES)
def test_no_two_values_share_a_place(name: str) -> None:
    """All channels, ranks, bank groups and banks are used, every place is in the device and taken once."""
    device, layout = Device.load(name), BankLayout.of(name)
    n, k = 2 * layout.channels * layout.ranks * layout.bank_groups * layout.banks_per_group + 5, 700
    seen = [layout.address(row, column, k) for row in range(n) for column in (0, 511, 512, 699)]
    assert len(set(seen)) == len(seen)
    limits = [device[f"memory.{x}"] for x in ("channels", "ranks", "bank_groups", "banks_per_group", "rows")]
    for part, limit in zip(zip(*seen, strict=True), limits, strict=False):
        assert min(part) == 0 and max(part) < limit
    assert [len({a[i] for a in seen}) for i in range(4)] == limits[:4]
    assert {a.column for a in seen} <= set(range(layout.values))


def test_the_bank_ordered_reference_walks_addresses() -> None:
    """The sum of one output by hand: its bank's rows one after the other, 16 products a command by a tree."""
    layout = BankLayout.of("neupims")
    matrix, x = normal(70, 1100).half(), normal(1, 1, 1100, seed=1).half()
    device: dict = {}
    for column in range(1100):
        device[layout.address(66, column, 1100)] = matrix[66, column]
    results = []
    for row in range(layout.chunks(1100)):  # row 66 is in tile 2, and that in channel 2
        acc = torch.zeros(())
        for first in range(0, 512, 16):
            products = torch.zeros(16)
            for i in range(16):
                at = row * 512 + first + i
                if at < 1100:
                    value = device[(2, 0, 0, 2, row, first + i)]
                    products[i] = value.float() * x[0, 0, at].float()
            while len(products) > 1:
                products = products[0::2] + products[1::2]
            acc = acc + products[0]
        results.append(acc.half().float())
    got = layout.gemv(x, layout.pack(matrix)[None], 70)[0, 0, 66]
    assert torch.equal(got, torch.stack(results))


@pytest.mark.parametrize("name", DEVICES)
@pytest.mark.parametrize("shape", [(5, 7), (64, 512), (300, 1100)])
def test_linear(name: str, shape: tuple[int, int]) -> None:
    """The bits of the reference, within the error of its roundings; many rows are the processor's."""
    n, k = shape
    layer = torch.nn.Linear(k, n)
    (moved,) = offload(torch.nn.Sequential(layer), name, rows=3).children()
    assert isinstance(moved, PimLinear)
    x = normal(3, k, seed=2)
    layout = BankLayout.of(name)
    weight, narrow = layer.weight.detach().half(), x.half()
    results = reference.pim_gemv(
        narrow[None], layout.pack(weight)[None], n, layout.values, layout.lanes, narrow_results=layout.narrow
    )
    total = results[0, ..., 0]
    for i in range(1, results.shape[-1]):
        total = total + results[0, ..., i]
    expected = total + layer.bias.detach()
    assert torch.equal(moved(x), expected)
    exact = narrow.double() @ weight.double().T + layer.bias.double()
    scale = narrow.abs().double() @ weight.abs().double().T
    allowed = (HALF * layout.narrow + (k + 8) * 2.0**-24) * scale + 2.0**-24 * exact.abs() + 2.0**-25
    assert ((moved(x) - exact).abs() <= allowed).all()
    many = normal(40, k, seed=3)
    assert torch.allclose(moved(many), many.half().float() @ weight.float().T + layer.bias, atol=1e-4, rtol=1e-4)
    assert moved(x.view(1, 3, k)).shape == (1, 3, n) and moved(x[:0]).shape == (0, n)


CONFIG = ModelConfig(
    model_type="llama", vocab_size=300, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=128,
)  # fmt: skip


@pytest.mark.parametrize("name", DEVICES)
@torch.inference_mode()
def test_a_model_and_its_cache_in_banks(name: str) -> None:
    """A prompt, padded rows, decode steps, reorder and rollback: logits stay near the dense model's."""
    plain, moved = (Llama.random(CONFIG, std=0.1) for _ in range(2))
    offload(moved, name)
    assert {o.name.rpartition(".")[2] for o in moved.offloaded} >= {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}
    tokens = torch.randint(0, 300, (3, 40), generator=torch.Generator().manual_seed(4))
    shape = (CONFIG.num_hidden_layers, 3, 128, CONFIG.num_key_value_heads, CONFIG.head_dim)
    dense, banked = plain.new_cache(3, 128), BankedKVCache(name, *shape)
    outs = []
    for model, cache in ((plain, dense), (moved, banked)):
        found = [model.forward(tokens[:, :20], cache, lengths=[20, 13, 7])]
        found += [model.forward(tokens[:, i : i + 1], cache) for i in range(20, 28)]
        cache.reorder([2, 0, 1])
        cache.rollback([10, 25, 21])
        found += [model.forward(tokens[:, i : i + 1], cache) for i in range(28, 40)]
        outs.append(torch.stack([f[:, -1] for f in found]))
    assert (outs[0] - outs[1]).abs().max() < 0.02 * outs[0].abs().max()
    assert (outs[0] - outs[1]).abs().max() > 0


@pytest.mark.parametrize("name", ["neupims", "duplex"])
@torch.inference_mode()
def test_attention_in_banks_is_attention(name: str) -> None:
    """Against dense attention of the same 16-bit keys and values, sequences of several lengths, none among them."""
    layout = BankLayout.of(name)
    cache = BankedKVCache(name, 1, 4, 1100, 2, 32)
    lengths = [1100, 513, 32, 1]
    k, v = (normal(4, 1100, 2, 32, seed=i).half().float() for i in (5, 6))
    step = cache.plan(1100, lengths)
    placed = [torch.zeros_like(x) for x in (k, v)]
    for to, x in zip(placed, (k, v), strict=True):
        for b, n in enumerate(lengths):
            to[b, 1100 - n :] = x[b, :n]
    cache.layers[0].append(*placed, step)
    cache.advance(step)
    cache.rollback([n - 1 for n in lengths])
    step = cache.plan(1)
    last = [torch.stack([x[b, n - 1 : n] for b, n in enumerate(lengths)]) for x in (k, v)]
    cache.layers[0].append(*last, step)
    q = normal(4, 1, 6, 32, seed=7).half().float()
    got = cache.layers[0].attend(q, step)
    dense = super(type(cache.layers[0]), cache.layers[0]).attend(q, step)
    # Logits are off by half a unit of 16 bits, weights and sums by the same share.
    logits = torch.einsum("bhd,blhd->bhl", q[:, 0], k.repeat_interleave(3, 2)).abs().max() * 32**-0.5
    assert (got - dense).abs().max() <= 4 * HALF * (1 + float(logits)) * v.abs().max() * (1 + 3 * layout.narrow)


@torch.inference_mode()
def test_experts_are_divided_and_added_once() -> None:
    """Experts at the banks and at the processor give what the layer gives; those with few tokens are the units'."""
    for kwargs in ({}, {"bias": True, "interleaved": True}, {"gated": False, "activation": "gelu"}):
        moe = MoE(64, 96, 8, 2, **kwargs)
        for i, p in enumerate(moe.parameters()):
            p.copy_(normal(*p.shape, seed=i) * 0.2)
        x = normal(50, 64, seed=9)
        expected = moe(x)
        offload(moe, "duplex")
        got = moe(x)
        assert (got - expected).abs().max() < 4e-3 * expected.abs().max()
        near = moe.panels.near
        routing = moe.router(x)
        tokens = torch.bincount(routing.ids.flatten().long(), minlength=8)
        sections = tokens.view(2, 4).sum(0)  # expert e lies in section e mod 4
        chosen = [near[s] for s in sections.argsort(stable=True).tolist()]
        assert chosen == sorted(chosen, reverse=True) and any(near) and near[:4] == near[4:]
        assert torch.equal(moe(x[:0]), x[:0])


def test_units_take_few_vectors_and_the_processor_many() -> None:
    for name in DEVICES:
        costs = Costs(Device.load(name))
        rows = costs.crossover(4096, 4096)
        assert 1 <= rows < 200
        assert costs.of_units(rows, 4096, 4096) <= costs.of_processor(rows, 4096, 4096)
        assert costs.of_units(rows + 1, 4096, 4096) > costs.of_processor(rows + 1, 4096, 4096)
        assert costs.of_units(0, 4096, 4096) == 0
    assert 28 <= Costs(Device.load("duplex")).crossover(14336, 4096) <= 36  # the paper's 32 operations a byte


@torch.inference_mode()
def test_a_mixture_of_experts_model() -> None:
    sizes = {
        "model_type": "mixtral", "vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2,
        "max_position_embeddings": 64,
    }  # fmt: skip
    model = Mixtral.random(ModelConfig.from_dict(sizes), std=0.1)
    tokens = torch.randint(0, 300, (2, 12), generator=torch.Generator().manual_seed(1))
    expected = model.forward(tokens)
    offload(model, "duplex")
    got = model.forward(tokens)
    assert 0 < (got - expected).abs().max() < 0.03 * expected.abs().max()


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: offload(torch.nn.Sequential(), "npu"), "expected one with processing in memory, got npu"),
        (lambda: offload(torch.nn.Linear(2, 2), "neupims", dtype=torch.float32), "dtype: expected float16 or bfloat16"),
        (lambda: offload(torch.nn.Linear(2, 2), "neupims"), "expected a model that holds layers, got a Linear"),
        (lambda: offload(MoE(8, 8, 2, 1).pack_("bf16"), "duplex"), "expected experts as parameters, got panels"),
        (lambda: offload(MoE(8, 8, 2, 1, activation="swiglu_oai"), "duplex"), "got activation 'swiglu_oai'"),
        (lambda: BankedKVCache("neupims", 1, 1, 8, 1, 96), "head_dim: expected a divisor of the 512 values"),
        (lambda: BankedKVCache("a100", 1, 1, 8, 1, 64), "expected one with processing in memory, got a100"),
    ],
)
def test_wrong_calls(call, words: str) -> None:
    with pytest.raises(ValueError) as error:
        call()
    assert words in str(error.value)


def test_layers_that_are_skipped_stay() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), effnn.Linear(4, 4))
    offload(model, "neupims", skip=["0"])
    assert isinstance(model[0], torch.nn.Linear) and isinstance(model[1], PimLinear)
    assert [o.name for o in model.offloaded] == ["1"]
    offload(model, "neupims", linears=False)
    assert model.offloaded == []
    model.double()
    assert model[1].banks.dtype == torch.float16 and model[0].bias.dtype == torch.float64
    attention = offload(torch.nn.MultiheadAttention(8, 2), "neupims")  # its projection is more than a layer
    assert attention.offloaded == [] and attention(*[torch.zeros(3, 1, 8)] * 3)[0].shape == (3, 1, 8)
