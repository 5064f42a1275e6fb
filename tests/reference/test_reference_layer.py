"""The reference's layer ops against torch's own and hand-written rotations."""

from __future__ import annotations

import math

import pytest
import torch
from effops import reference


def test_rms_norm_equals_torch():
    x, w = torch.randn(3, 5, 16, dtype=torch.float64), torch.randn(16, dtype=torch.float64)
    expected = torch.nn.functional.rms_norm(x, (16,), w, 1e-5)
    torch.testing.assert_close(reference.rms_norm(x, w, 1e-5), expected)
    torch.testing.assert_close(reference.rms_norm(x, w - 1, 1e-5, weight_offset=1.0), expected)


def test_rms_norm_keeps_its_statistics_in_float32():
    x = torch.full((1, 4096), 300.0, dtype=torch.float16)  # the squares overflow float16
    assert torch.equal(reference.rms_norm(x, torch.ones(4096).half()), torch.ones_like(x))


def test_packed_linear():
    x, w, b = torch.randn(2, 3, 8), torch.randn(5, 8), torch.randn(5)
    residual = torch.randn(2, 3, 5)
    expected = torch.nn.functional.linear(x, w, b) + residual
    torch.testing.assert_close(reference.packed_linear(x, w, b, residual=residual), expected)
    packed = reference.pack_weight(w, "bf16")
    assert packed.dtype == torch.bfloat16
    torch.testing.assert_close(reference.packed_linear(x, packed), x @ packed.float().T)
    with pytest.raises(RuntimeError, match="pack_weight: format: expected one of f32, bf16, f16, got 'int3'"):
        reference.pack_weight(w, "int3")


def test_rotary_turns_each_pair_by_its_angle():
    angles = torch.rand(10, 2, dtype=torch.float64)
    x = torch.randn(2, 3, 4, 6, dtype=torch.float64)
    positions = torch.tensor([[0, 5, 9], [3, 3, 1]], dtype=torch.int32)
    got = reference.rotary(x, angles.cos(), angles.sin(), positions)
    for b in range(2):
        for t in range(3):
            for pair in range(2):
                turn = torch.polar(torch.tensor(1.0).double(), angles[positions[b, t], pair])
                expected = torch.complex(x[b, t, :, pair], x[b, t, :, pair + 2]) * turn
                torch.testing.assert_close(torch.complex(got[b, t, :, pair], got[b, t, :, pair + 2]), expected)
    assert torch.equal(got[..., 4:], x[..., 4:])


def test_silu_mul():
    x = torch.tensor([[1.0, -2.0, 3.0, 4.0]])
    expected = torch.tensor([[3.0 / (1 + math.exp(-1.0)), -8.0 / (1 + math.exp(2.0))]])
    torch.testing.assert_close(reference.silu_mul(x), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_results_keep_the_input_dtype(dtype):
    x, w = torch.randn(2, 3, 8).to(dtype), torch.randn(4, 8).to(dtype)
    table = torch.rand(5, 2)
    positions = torch.zeros(2, 3, dtype=torch.int32)
    results = [
        reference.rms_norm(x, w[0]),
        reference.packed_linear(x, w),
        reference.silu_mul(x),
        reference.rotary(x[:, :, None], table, table, positions),
        reference.attention(x[:, :, None], x[:, :, None], x[:, :, None]),
    ]
    assert all(r.dtype == dtype for r in results)
