"""The dense cache: where tokens go, what a step sees, memory layout, limits."""

from __future__ import annotations

import pytest
import torch
from effops import reference
from effops.cache import DenseKVCache


def cache(batch=2, capacity=8, layers=2, **changes):
    return DenseKVCache(layers, batch, capacity, num_kv_heads=2, head_dim=4, **changes)


def test_memory_is_heads_major_and_shown_tokens_first():
    c = cache(v_head_dim=6, dtype=torch.bfloat16)
    assert (c.batch_size, c.capacity) == (2, 8)
    for layer in c.layers:
        assert layer.k.shape == (2, 8, 2, 4) and layer.v.shape == (2, 8, 2, 6)
        assert layer.k.stride() == (2 * 8 * 4, 4, 8 * 4, 1)
        assert layer.k.transpose(1, 2).is_contiguous()
    assert c.layers[1].k.data_ptr() - c.layers[0].k.data_ptr() == 2 * 2 * 8 * 4 * 2
    assert c.nbytes == 2 * 2 * 8 * 2 * (4 + 6) * 2


def test_steps_of_equal_rows():
    c = cache()
    step = c.plan(3)
    assert step.positions.tolist() == step.slots.tolist() == [[0, 1, 2]] * 2
    assert (step.kv_lens.tolist(), step.lengths, step.max_kv_len) == ([3, 3], [3, 3], 3)
    assert c.lengths == [0, 0]  # planning alone changes nothing
    c.advance(step)
    assert c.lengths == [3, 3] and c.kv_lens.tolist() == [3, 3]
    step = c.plan(1)
    assert step.slots.tolist() == [[3], [3]] and step.kv_lens.tolist() == [4, 4]
    assert {step.positions.dtype, step.slots.dtype, step.kv_lens.dtype} == {torch.int32}
    c.reset()
    assert c.plan(2).slots.tolist() == [[0, 1]] * 2


def test_steps_of_padded_rows():
    c = cache()
    step = c.plan(4, [4, 1])
    assert step.positions.tolist() == [[0, 1, 2, 3], [0, 0, 0, 0]]
    assert step.slots.tolist() == [[0, 1, 2, 3], [-1, -1, -1, 0]]
    c.advance(step)
    step = c.plan(2)  # rows of different length from now on
    assert step.slots.tolist() == step.positions.tolist() == [[4, 5], [1, 2]]
    c.advance(step)
    step = c.plan(2, [0, 2])
    assert step.slots.tolist() == [[-1, -1], [3, 4]] and step.lengths == [6, 5] and step.max_kv_len == 6
    assert step.positions.tolist() == [[0, 0], [3, 4]]
    c.advance(step)
    assert c.kv_lens.tolist() == c.lengths == [6, 5]


def test_limits():
    c = cache()
    c.advance(c.plan(6))
    with pytest.raises(ValueError, match="DenseKVCache: tokens: expected at most 8 a sequence, got 9"):
        c.plan(3)
    assert c.plan(3, [1, 2]).max_kv_len == 8
    for wrong in ([1], [1, 4], [-1, 1]):
        with pytest.raises(ValueError, match="DenseKVCache: lengths: expected 2 numbers from 0 to 3"):
            c.plan(3, wrong)


def test_attends_to_what_was_appended_and_to_nothing_else():
    """Chunks of ragged rows against the reference on the compact keys; the rest of the memory is poison."""
    c = cache(capacity=9, layers=1)
    for memory in (c._k, c._v):
        memory.fill_(torch.nan)
    generator = torch.Generator().manual_seed(0)
    held: list[list[torch.Tensor]] = [[], []]
    for tokens, lengths in ((4, [4, 2]), (1, None), (2, [1, 2]), (1, [0, 1])):
        q = torch.randn(2, tokens, 4, 4, generator=generator)
        k, v = (torch.randn(2, tokens, 2, 4, generator=generator) for _ in range(2))
        step = c.plan(tokens, lengths)
        c.layers[0].append(k, v, step)
        out = c.layers[0].attend(q, step, causal=True)
        c.advance(step)
        for b in range(2):
            new = tokens if lengths is None else lengths[b]
            held[b].append(torch.stack([k[b], v[b]])[:, tokens - new :])
            keys, values = torch.cat(held[b], 1)
            query = q[b : b + 1, tokens - new :]
            expected = reference.attention(query, keys[None], values[None], causal=True)
            torch.testing.assert_close(out[b, tokens - new :], expected[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("outer, inner", [(False, True), (True, False)])
def test_lives_in_and_out_of_inference_mode(outer, inner):
    with torch.inference_mode(outer):
        c = cache(layers=1)
    new = torch.ones(2, 1, 2, 4)
    for mode in (inner, outer, inner):
        with torch.inference_mode(mode), torch.no_grad():
            step = c.plan(1)
            c.layers[0].append(new, new, step)
            out = c.layers[0].attend(torch.ones(2, 1, 2, 4), step, causal=True)
            c.advance(step)
            assert torch.equal(out, torch.ones(2, 1, 2, 4))
    assert c.lengths == [3, 3]
