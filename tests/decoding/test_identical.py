"""The verdict on two runs, on made-up logits where the right answer is known."""

from __future__ import annotations

import pytest
import torch
from effops.decoding import compare
from torch import nn

PROMPT = [0, 1]


class Table(nn.Module):
    """Float64 logits by position, whatever the tokens are."""

    def __init__(self, rows):
        super().__init__()
        self.rows = torch.tensor(rows, dtype=torch.float64)
        self.seen: list[list[int]] = []

    def forward(self, tokens):
        self.seen.append(tokens[0].tolist())
        return self.rows[None, : tokens.shape[1]]


# Two prompt positions, then three more: the logits before new tokens 0, 1, 2 are rows 1, 2, 3.
EXACT = [[9.0, 0, 0], [1.0, 5.0, 2.0], [4.0, 3.9, 0.0], [0.0, 1.0, 8.0], [1.0, 0.0, 0.0]]


def run(tokens, error=0.0):
    logits = torch.tensor(EXACT[1 : 1 + len(tokens)], dtype=torch.float32)
    logits[:, 0] += error
    return tokens, logits


def judge(a, b, exact=EXACT):
    return compare(PROMPT, *a, *b, Table(exact))


def test_identical():
    verdict = judge(run([1, 0, 2]), run([1, 0, 2], 2e-3))
    assert verdict.kind == "identical" and verdict.position is None
    assert verdict.error == pytest.approx(2e-3, rel=1e-3) and verdict.largest_logit == 8.0


def test_near_tie_up_to_twice_the_error_and_no_beyond():
    close = [[9.0, 0, 0], [1.0, 5.0, 2.0], [4.0, 3.998, 0.0], [0.0, 1.0, 8.0]]
    a, b = run([1, 0, 2]), run([1, 1, 2])
    for logits in (a[1], b[1]):
        logits[1] = torch.tensor([4.0, 3.998, 0.0])
    b[1][1, 1] += 0.0011
    verdict = judge(a, b, close)
    assert verdict.kind == "near-tie" and verdict.position == 1
    assert verdict.margin == pytest.approx(0.002)
    b[1][1, 1] -= 0.0003  # an error of 0.0008: the margin is now more than twice that
    assert judge(a, b, close).kind == "NO"


def test_a_clear_difference_is_a_no():
    verdict = judge(run([1, 0, 2], 1e-3), run([1, 2, 2]))
    assert verdict.kind == "NO" and verdict.position == 1 and verdict.margin == pytest.approx(0.1)


def test_a_large_error_is_a_no_even_where_the_tokens_agree():
    assert judge(run([1, 0, 2]), run([1, 0, 2], 0.009)).kind == "NO"
    assert judge(run([1, 0, 2], 0.005), run([1, 0, 2], 0.005)).kind == "NO"  # the errors add up
    assert judge(run([1, 0, 2]), run([1, 0, 2], torch.nan)).kind == "NO"


def test_errors_after_the_first_difference_do_not_count():
    a, b = run([1, 0, 2]), run([1, 0, 1])
    b[1][2, 0] += 1e-4
    exact = [*EXACT[:3], [0.0, 8.0, 8.0], [0.0, 0.0, 0.0]]
    for logits in (a[1], b[1]):
        logits[2, 1] = 8.0
    assert judge(a, b, exact).kind == "near-tie"
    later = run([1, 1, 2])
    later[1][2] = 1000.0
    assert judge(run([1, 0, 2]), later).error < 1e-6


def test_different_lengths_are_a_no():
    verdict = judge(run([1, 0, 2]), run([1, 0]))
    assert verdict.kind == "NO" and verdict.position == 2


def test_the_exact_model_is_fed_with_the_common_prefix():
    table = Table(EXACT)
    compare(PROMPT, *run([1, 0, 2]), *run([1, 1, 2]), table)
    assert table.seen == [[*PROMPT, 1]]


def test_types_are_checked():
    tokens, logits = run([1, 0])
    with pytest.raises(ValueError, match=r"compare: logits_b: expected float32, got torch\.bfloat16"):
        compare(PROMPT, tokens, logits, tokens, logits.bfloat16(), Table(EXACT))

    class Float32(Table):
        def forward(self, tokens):
            return super().forward(tokens).float()

    with pytest.raises(ValueError, match=r"exact_logits: model: expected float64 logits, got torch\.float32"):
        compare(PROMPT, tokens, logits, tokens, logits, Float32(EXACT))
