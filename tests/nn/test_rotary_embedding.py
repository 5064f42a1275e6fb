"""Rotary scalings against Transformers' frequencies, and the life of the tables."""

from __future__ import annotations

import pytest
import torch
from effops.nn import RotaryEmbedding, inverse_frequencies

CPU = torch.device("cpu")
SCALINGS = {
    "linear": {"factor": 3.0},
    "dynamic": {"factor": 2.0},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 32},
    "longrope": {
        "short_factor": [1.0] * 8,
        "long_factor": [1.0 + i for i in range(8)],
        "original_max_position_embeddings": 32,
    },
}


@pytest.mark.parametrize("kind", SCALINGS)
@pytest.mark.parametrize("length", [16, 200])
def test_frequencies_equal_transformers(kind, length):
    transformers = pytest.importorskip("transformers", reason="transformers is the peer of this test")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters = {"rope_type": kind, "rope_theta": 10000.0, **SCALINGS[kind]}
    config = transformers.LlamaConfig(
        hidden_size=64,
        num_attention_heads=4,
        max_position_embeddings=128,
        rope_parameters=dict(parameters),
    )
    theirs, their_scale = ROPE_INIT_FUNCTIONS[kind](config, CPU, seq_len=length)
    ours, scale = inverse_frequencies(16, parameters, 128, length)
    torch.testing.assert_close(ours, theirs, rtol=2**-22, atol=0)
    assert scale == pytest.approx(their_scale)


def test_unknown_type():
    with pytest.raises(ValueError, match=r"rope_type: expected one of default, .*, got 'odd'"):
        RotaryEmbedding(8, 16, {"rope_type": "odd", "rope_theta": 1.0})


def test_tables_grow_and_are_kept():
    rope = RotaryEmbedding(8, 4096)
    cos, sin = rope.tables(5, CPU)
    assert rope.tables(1024, CPU)[0] is cos and cos.dtype == torch.float32
    longer = rope.tables(1025, CPU)[0]
    assert longer.shape == (2048, 4) and torch.equal(longer[:1024], cos)
    angle = 7 * 10000.0 ** (-2 / 8)
    assert float(cos[7, 1]) == pytest.approx(torch.tensor(angle).cos().item(), abs=1e-6)
    assert float(sin[7, 1]) == pytest.approx(torch.tensor(angle).sin().item(), abs=1e-6)


def test_tables_of_length_dependent_types():
    dynamic = RotaryEmbedding(16, 64, {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})
    short = dynamic.tables(64, CPU)[0]
    assert dynamic.tables(10, CPU)[0] is short
    grown = dynamic.tables(65, CPU)[0]
    assert not torch.equal(grown[:64], short) and not torch.equal(dynamic.tables(66, CPU)[0][:65], grown)
    assert torch.equal(dynamic.tables(3, CPU)[0], short)

    parameters = {"rope_type": "longrope", "rope_theta": 1e4, **SCALINGS["longrope"]}
    longrope = RotaryEmbedding(16, 128, parameters)
    short, long = longrope.tables(32, CPU)[0], longrope.tables(33, CPU)[0]
    assert not torch.equal(short, long[:32]) and longrope.tables(100, CPU)[0] is long
    assert torch.equal(longrope.tables(32, CPU)[0], short)


def test_partial_rotation_covers_its_share():
    parameters = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    assert RotaryEmbedding(16, 64, parameters).tables(1, CPU)[0].shape[1] == 4


def test_tables_built_in_inference_mode_serve_training():
    rope = RotaryEmbedding(8, 64)
    with torch.inference_mode():
        rope.tables(4, CPU)
    x = torch.ones(4, requires_grad=True)
    (rope.tables(4, CPU)[0][1] * x).sum().backward()
    assert torch.equal(x.grad, rope.tables(4, CPU)[0][1])
