"""The reference's sampling by hand, and bounds that hold in float32 and are tight enough to see small mistakes."""

from __future__ import annotations

import math

import pytest
import torch
from effops import reference
from effops.reference.sampling_bounds import sample_bound, sampling_probs_bound

LAW = torch.tensor([0.05, 0.30, 0.10, 0.30, 0.25], dtype=torch.float64)


def close(p, *expected):
    torch.testing.assert_close(p, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)


def law(**options):
    return reference.sampling_probs(LAW.log(), **options)


def test_each_filter():
    close(law(), *LAW)
    close(law(temperature=0.5), *(LAW**2 / (LAW**2).sum()))
    close(law(temperature=0), 0, 1, 0, 0, 0)
    close(law(top_k=1), 0, 1, 0, 0, 0)
    close(law(top_k=3), 0, 0.30 / 0.85, 0, 0.30 / 0.85, 0.25 / 0.85)
    close(law(top_p=0.2), 0, 1, 0, 0, 0)
    close(law(top_p=0.61), 0, 0.30 / 0.85, 0, 0.30 / 0.85, 0.25 / 0.85)
    close(law(min_p=0.5), 0, 0.30 / 0.85, 0, 0.30 / 0.85, 0.25 / 0.85)


def test_filters_in_their_order():
    close(law(top_k=3, top_p=0.7), 0, 0.5, 0, 0.5, 0)
    close(law(temperature=0.5, top_p=0.55), 0, 0.5, 0, 0.5, 0)
    close(law(top_k=4, min_p=0.9), 0, 0.5, 0, 0.5, 0)


def test_draws():
    x = torch.tensor([0.25, 0.0, 0.5, 0.25, 0.0], dtype=torch.float64).log()
    cases = {0.0: 0, 0.2499: 0, 0.25: 2, 0.74: 2, 0.75: 3, math.nextafter(1.0, 0.0): 3}
    uniforms = torch.tensor(list(cases), dtype=torch.float64)
    assert reference.sample(x.expand(6, -1), uniforms).tolist() == list(cases.values())
    assert reference.sample(x, uniforms[5], temperature=0.0) == 2 and reference.sample(x[None], uniforms[:1]) == 0


@pytest.mark.parametrize("options", [{}, {"temperature": 0.3}, {"top_k": 20, "min_p": 0.01}, {"top_p": 0.9}])
def test_bounds(options):
    x = 2 * torch.randn(4, 500, generator=torch.Generator().manual_seed(1))
    interval, kept = sampling_probs_bound(x, **options)
    p = torch.softmax(x / options.get("temperature", 1.0), -1) * kept.surely
    p = p / p.sum(-1, keepdim=True)
    assert torch.equal(kept.surely, kept.possibly)  # no threshold is near one of these tokens
    assert interval.worst(p) <= 1
    assert interval.worst(p * (1 + 1e-4)) > 1
    one_less = p.masked_fill(p == p.masked_fill(p == 0, 1).amin(-1, keepdim=True), 0.0)
    assert interval.worst(one_less) > 1
    sums, cumulative = sample_bound(x, **options)[0], p.double().cumsum(-1)
    assert sums.worst(cumulative / cumulative[:, -1:]) <= 1 and sums.error.max() < 1e-5


def test_a_token_at_an_edge_may_stay_or_go():
    """Half of four equal ones is exactly two, which rounding may take for less; no other token is in doubt."""
    interval, kept = sampling_probs_bound(torch.zeros(4), top_p=0.5)
    assert kept.surely.tolist() == [True, True, False, False] and kept.possibly.tolist() == [True, True, True, False]
    for p in ([0.5, 0.5, 0, 0], [1 / 3, 1 / 3, 1 / 3, 0]):
        assert interval.worst(torch.tensor(p)) <= 1
    assert interval.worst(torch.tensor([0.5, 0, 0.5, 0])) > 1
