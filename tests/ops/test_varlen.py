"""``varlen_attention``: within bounds, bit for bit the dense op of each sequence, blind to what no sequence owns."""

from __future__ import annotations

import pytest
import torch
from effops import ops
from effops.reference.bounds import varlen_attention_bound
from hypothesis import given
from hypothesis import strategies as st
from strategies.attention import Case, offsets, ragged
from strategies.values import DTYPES, int32, normal, same_bits
from torch import Tensor

pytestmark = [pytest.mark.core, pytest.mark.attention]


def attend(case: Case) -> tuple[Tensor, Tensor]:
    return ops.varlen_attention(*case.tensors, return_lse=True, **case.options)


@pytest.mark.parametrize("dtype", DTYPES)
@given(data=st.data())
def test_any_call(dtype, data):
    case = data.draw(ragged(DTYPES[dtype]))
    bounds = varlen_attention_bound(*case.tensors, **case.options)
    assert all(bound.worst(got) <= 1 for bound, got in zip(bounds, attend(case), strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@given(data=st.data())
def test_each_sequence_is_the_dense_op(dtype, data):
    case = data.draw(ragged(DTYPES[dtype], kinds=("spikes",)))
    q, k, v, cu_q, cu_k = case.tensors
    out, lse = attend(case)
    per_sequence = ("kv_starts", "prefix_lens")
    for b in range(len(cu_q) - 1):
        rows, keys = slice(cu_q[b], cu_q[b + 1]), slice(cu_k[b], cu_k[b + 1])
        options = {n: x[b : b + 1] if n in per_sequence and x is not None else x for n, x in case.options.items()}
        if options["kv_starts"] is not None:
            options["kv_starts"] = options["kv_starts"].clamp(max=keys.stop - keys.start)
        alone = ops.attention(q[None, rows], k[None, keys], v[None, keys], return_lse=True, **options)
        assert same_bits(alone[0][0], out[rows]) and same_bits(alone[1][0], lse[rows])
    assert out[cu_q[-1] :].eq(0).all() and lse[cu_q[-1] :].isneginf().all()


@pytest.mark.parametrize("threads", [2, 3])
def test_decode_prefill_and_idle_sequences_in_one_batch(threads):
    """Few and many rows, splits in both loops, empty sequences between; the same bits on any number of threads."""
    q_lens, k_lens = [1, 0, 40, 2, 110, 0, 3], [2100, 30, 4200, 0, 110, 0, 64]
    q, cu_q, cu_k = normal(sum(q_lens), 4, 32), offsets(q_lens), offsets(k_lens)
    k, v = (normal(sum(k_lens), 2, d, seed=d) for d in (32, 24))
    case = Case((q, k, v, cu_q, cu_k), {"causal": True, "window": 4000, "num_sinks": 5})
    bounds = varlen_attention_bound(*case.tensors, **case.options)
    single = attend(case)
    assert all(bound.worst(x) <= 1 for bound, x in zip(bounds, single, strict=True))
    torch.set_num_threads(threads)
    assert all(same_bits(x, y) for x, y in zip(single, attend(case), strict=True))


def test_bounds_on_the_host_change_nothing():
    q, k, v = normal(9, 4, 16), normal(70, 2, 16, seed=1), normal(70, 2, 16, seed=2)
    plain = ops.varlen_attention(q, k, v, int32(0, 4, 9), int32(0, 30, 70), causal=True)
    bounded = ops.varlen_attention(q, k, v, int32(0, 4, 9), int32(0, 30, 70), causal=True, max_q_len=5, max_kv_len=40)
    assert same_bits(plain, bounded)


def test_nothing():
    none = torch.empty(0, 2, 8)
    out, lse = ops.varlen_attention(none, none, none, int32(0), int32(0), return_lse=True)
    assert out.shape == (0, 2, 8) and lse.shape == (0, 2)
    out, lse = ops.varlen_attention(normal(3, 2, 8), none, none, int32(0, 0, 3), int32(0, 0, 0), return_lse=True)
    assert out.eq(0).all() and lse.isneginf().all()
    out, lse = ops.varlen_attention(normal(3, 2, 8), normal(4, 1, 8), normal(4, 1, 8), int32(0), int32(0),
                                    return_lse=True)  # fmt: skip
    assert out.shape == (3, 2, 8) and out.eq(0).all() and lse.isneginf().all()
