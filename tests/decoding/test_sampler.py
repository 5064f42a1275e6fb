"""The sampler: each filter by hand, the draw exactly, the frequencies statistically."""

from __future__ import annotations

import math

import pytest
import torch
from effops import ops
from effops.decoding import Sampler

LAW = torch.tensor([[0.05, 0.30, 0.10, 0.30, 0.25]], dtype=torch.float64)


def law(**options):
    return Sampler(**options).probabilities(LAW.log())[0]


def close(p, *expected):
    torch.testing.assert_close(p, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)


def test_filters():
    close(law(), 0.05, 0.30, 0.10, 0.30, 0.25)
    close(law(temperature=0.5), *(LAW[0] ** 2 / (LAW[0] ** 2).sum()))
    close(law(top_k=3), 0, 0.30 / 0.85, 0, 0.30 / 0.85, 0.25 / 0.85)
    close(law(top_p=0.59), 0, 0.5, 0, 0.5, 0)
    close(law(top_p=0.61), 0, 0.30 / 0.85, 0, 0.30 / 0.85, 0.25 / 0.85)
    close(law(min_p=0.5), 0, 0.30 / 0.85, 0, 0.30 / 0.85, 0.25 / 0.85)
    close(law(temperature=0), 0, 1, 0, 0, 0)


def test_results_are_the_ops():
    """In float32, with the given uniforms or the generator's, and beside a gradient that nobody asks for."""
    x, options = 2 * torch.randn(6, 300, generator=torch.Generator().manual_seed(1)), {"top_k": 20, "top_p": 0.9}
    u = torch.rand(6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    sampler, drawn = Sampler(**options, generator=torch.Generator().manual_seed(2)), ops.sample(x, u, **options)
    p = sampler.probabilities(x)
    assert p.dtype == torch.float32 and torch.equal(p, ops.sampling_probs(x, **options))
    assert torch.equal(sampler(x.requires_grad_(), u), drawn) and torch.equal(sampler(x), drawn)


def test_greedy_draws_nothing_from_the_generator():
    generator = torch.Generator().manual_seed(1)
    before = generator.get_state()
    Sampler(temperature=0.0, generator=generator)(torch.randn(3, 9))
    assert torch.equal(generator.get_state(), before)


def test_ties_go_to_the_lowest_id():
    close(law(top_k=1), 0, 1, 0, 0, 0)
    close(law(top_p=0.2), 0, 1, 0, 0, 0)
    equal = torch.zeros(1, 6)
    assert Sampler(top_k=4).probabilities(equal)[0].tolist() == [0.25] * 4 + [0, 0]
    assert Sampler(top_p=0.5).probabilities(equal)[0].nonzero().flatten().tolist() == [0, 1, 2]
    assert Sampler.greedy()(torch.tensor([[1.0, 3.0, 3.0], [2.0, 2.0, 2.0]])).tolist() == [1, 0]


def test_filters_act_in_their_order():
    # top-p after top-k sees the renormalised law: 0.60/0.85 >= 0.7, which 0.60 of the whole is not.
    close(law(top_k=3, top_p=0.7), 0, 0.5, 0, 0.5, 0)
    # Temperature first: it decides what top-p keeps.
    close(law(temperature=0.5, top_p=0.55), 0, 0.5, 0, 0.5, 0)
    # min-p refers to the largest probability that is left.
    assert (law(top_k=4, min_p=0.9) > 0).tolist() == [False, True, False, True, False]


def test_filters_wider_than_the_vocabulary_change_nothing():
    close(law(top_k=50, top_p=1.0, min_p=0.0), *LAW[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_logits(dtype):
    logits = torch.tensor([[-torch.inf, 300.0, -torch.inf, 296.0]], dtype=dtype)
    p = Sampler(temperature=0.01, top_k=3, top_p=0.9).probabilities(logits)
    assert torch.isfinite(p).all() and p[0, 1] == 1 and p.sum() == 1


def test_draw_is_the_inverse_cdf_in_id_order():
    logits = torch.tensor([[0.25, 0.0, 0.5, 0.25, 0.0]], dtype=torch.float64).log()
    cases = {0.0: 0, 0.2499: 0, 0.25: 2, 0.74: 2, 0.75: 3, math.nextafter(1.0, 0.0): 3}
    uniforms = torch.tensor(list(cases), dtype=torch.float64)
    drawn = Sampler()(logits.expand(len(cases), -1), uniforms)
    assert drawn.tolist() == list(cases.values())


def test_frequencies():
    """200 000 draws: a chi-square of 4 degrees above 23.5 happens once in 10 000 right samplers.

    A sampler whose law is off by 0.01 in one token against another is caught with probability above 0.999.
    """
    n = 200_000
    sampler = Sampler(generator=torch.Generator().manual_seed(5))
    drawn = sampler(LAW.log().expand(n, -1))
    counts = torch.bincount(drawn, minlength=5).double()
    chi_square = ((counts - n * LAW[0]) ** 2 / (n * LAW[0])).sum()
    assert chi_square < 23.5


def test_generator_repeats():
    draws = [Sampler(generator=torch.Generator().manual_seed(s))(torch.zeros(20, 50)).tolist() for s in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]


@pytest.mark.parametrize(
    "options", [{"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.5}, {"min_p": 2.0}]
)
def test_wrong_options(options):
    (name,) = options
    with pytest.raises(ValueError, match=f"Sampler: {name}: expected .*, got"):
        Sampler(**options)
