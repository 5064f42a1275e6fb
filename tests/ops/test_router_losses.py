"""Losses of routers: against the papers' formulas, their laws, and batches in pieces."""

from __future__ import annotations

import pytest
import torch
from effops import ops, reference
from hypothesis import given
from hypothesis import strategies as st
from strategies import experts
from strategies.values import DTYPES, int32, normal

CONVENTIONS = ("switch", "hf", "gshard")


@pytest.mark.parametrize("dtype", DTYPES)
@given(data=st.data())
def test_against_the_reference(dtype, data):
    tokens, k, count = data.draw(st.integers(0, 20)), data.draw(st.integers(1, 4)), data.draw(st.integers(1, 9))
    probs = normal(tokens, count, dtype=DTYPES[dtype]).softmax(-1)
    ids = data.draw(experts.choices(tokens, k, count))
    mask = normal(tokens, seed=3) > -0.5 if data.draw(st.booleans()) else None
    frequencies = torch.rand(count, generator=torch.Generator().manual_seed(1)) if data.draw(st.booleans()) else None
    for convention in CONVENTIONS:
        options = {"mask": mask, "convention": convention, "frequencies": frequencies}
        got, expected = (m.load_balancing_loss(probs, ids, **options) for m in (ops, reference))
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(*(m.router_z_loss(probs, mask) for m in (ops, reference)), rtol=1e-5, atol=1e-6)


def test_conventions_of_an_even_load():
    """All experts equally likely and equally often chosen: 1, K, and 1 / E^2."""
    probs, ids = torch.full((12, 4), 0.25), torch.arange(24).remainder(4).int().view(12, 2)
    values = {c: ops.load_balancing_loss(probs, ids, convention=c).item() for c in CONVENTIONS}
    assert values["switch"] == pytest.approx(1) and values["hf"] == pytest.approx(2)
    assert values["gshard"] == pytest.approx(1 / 16)


def test_collapse_is_the_worst():
    """All on one expert: E; nothing can exceed it."""
    probs, ids = torch.eye(4)[torch.zeros(9, dtype=torch.long)], torch.zeros(9, 1, dtype=torch.int32)
    assert ops.load_balancing_loss(probs, ids).item() == pytest.approx(4)
    other = normal(9, 4).softmax(-1)
    assert ops.load_balancing_loss(other, other.argmax(-1, keepdim=True).int()) < 4


def test_masked_tokens_count_in_nothing():
    """The same as without them, gradient included, whatever they hold."""
    logits, mask = normal(10, 5), torch.arange(10) % 3 != 0
    logits[~mask] = torch.nan
    logits.requires_grad_()
    ids = ops.topk_routing(logits.detach().nan_to_num(), 2)[1]
    loss = ops.load_balancing_loss(logits.softmax(-1), ids, mask=mask) + ops.router_z_loss(logits, mask)
    kept = logits.detach()[mask].requires_grad_()
    alone = ops.load_balancing_loss(kept.softmax(-1), ids[mask]) + ops.router_z_loss(kept)
    torch.testing.assert_close(loss, alone)
    (gradient,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(gradient[mask], torch.autograd.grad(alone, kept)[0])
    none = torch.zeros(10, dtype=torch.bool)
    assert ops.load_balancing_loss(kept.new_zeros(10, 5), ids, mask=none) == 0 and ops.router_z_loss(logits, none) == 0


def test_dropped_choices_fall_on_no_expert():
    probs, ids = normal(8, 4).softmax(-1), torch.arange(16).remainder(4).int().view(8, 2)
    half = ids.clone()
    half[:, 1] = -1
    expected = ops.load_balancing_loss(probs, ids[:, :1]) / 2
    torch.testing.assert_close(ops.load_balancing_loss(probs, half), expected)


def test_global_frequencies():
    """Micro-batches add up to the batch, also where they differ in size; the loss with them is that of the batch."""
    logits = normal(24, 6)
    probs, ids = logits.softmax(-1), ops.topk_routing(logits, 2)[1]
    mask = torch.arange(24) != 5
    counted = ops.GlobalFrequencies(6)
    assert counted.value().equal(torch.zeros(6))
    for part in (slice(0, 3), slice(3, 20), slice(20, 24)):
        counted.update(ids[part], mask[part])
    whole = ops.GlobalFrequencies(6)
    whole.update(ids[mask])
    torch.testing.assert_close(counted.value(), whole.value())
    assert counted.value().sum().item() == pytest.approx(1)
    expected = ops.load_balancing_loss(probs, ids, mask=mask)
    torch.testing.assert_close(ops.load_balancing_loss(probs, ids, mask=mask, frequencies=counted.value()), expected)
    parts = [
        ops.load_balancing_loss(probs[s], ids[s], frequencies=whole.value()) for s in (slice(0, 12), slice(12, 24))
    ]
    torch.testing.assert_close(sum(parts) / 2, ops.load_balancing_loss(probs, ids, frequencies=whole.value()))
    counted.reset()
    assert counted.value().equal(torch.zeros(6))


def test_global_frequencies_over_processes(monkeypatch):
    """What one process sends comes back as the sum of all: here of two that count the same. Counts go out once."""
    counted = ops.GlobalFrequencies(3)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda x, group=None: x.mul_(2))
    counted.update(int32(0, 1, 1).view(3, 1))
    counted.all_reduce()
    counted.update(int32(2, 2).view(2, 1))
    counted.all_reduce()
    torch.testing.assert_close(counted.value(), torch.tensor([0.2, 0.4, 0.4]))
    assert counted._shared.tolist() == [2, 4, 4, 10] and not counted._own.any()


def test_refusals():
    probs, ids = normal(4, 3).softmax(-1), torch.zeros(4, 2, dtype=torch.int32)
    calls = {
        "load_balancing_loss: convention: expected one of switch, hf, gshard, got cv": {"convention": "cv"},
        r"load_balancing_loss: mask: expected bool \[4\], got torch.float32 \[4\]": {"mask": torch.ones(4)},
        r"load_balancing_loss: mask: expected bool \[4\], got torch.bool \[3\]": {"mask": torch.ones(3).bool()},
        r"load_balancing_loss: frequencies: expected shape \[3\], got \[4\]": {"frequencies": torch.ones(4)},
        r"load_balancing_loss: ids: expected shape \[4, K\], got \[3, 2\]": {"ids": ids[:3]},
        r"load_balancing_loss: probs: expected shape \[N, E\], got \[3\]": {"probs": probs[0]},
    }
    for says, call in calls.items():
        with pytest.raises(ValueError, match=says):
            ops.load_balancing_loss(**{"probs": probs, "ids": ids, **call})
    with pytest.raises(ValueError, match=r"router_z_loss: logits: expected shape \[N, E\], got \[3\]"):
        ops.router_z_loss(probs[0])
    with pytest.raises(ValueError, match="GlobalFrequencies: num_experts: expected 1 or more, got 0"):
        ops.GlobalFrequencies(0)
