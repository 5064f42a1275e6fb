"""A model of two layers that recalls, written down rather than trained: what stood after the last token's earlier
occurrence comes next.

Layer 0 copies the token before each position (a previous-token head), layer 1 finds the position whose copied token is
the present one and reads the token there: an induction head (Elhage et al. 2021, "A Mathematical Framework for
Transformer Circuits"). It needs the whole context where everything else in it needs a few tokens, so that it tells what
a sparse cache loses of recall from what it loses of language. The first token of all, before which none stands, counts
as its own predecessor: what follows it is not recalled by it.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from effops.models import Llama, ModelConfig

DIM = 64  # of a head; its rotary planes i and i + 32 turn together
CODE = 32  # numbers that a token is known by
_SLOW = torch.arange(DIM // 4, DIM // 2)  # rotary planes that hardly turn over a context
_FAST = torch.arange(0, DIM // 4)
_CONTENT = torch.cat([_SLOW, _SLOW + DIM // 2])
PREVIOUS, INDUCTION = 60.0, 60.0  # the score of the wanted key


def induction_model(
    vocabulary: int = 256, *, context: int = 4096, dtype: torch.dtype = torch.float32, seed: int = 0
) -> Llama:
    """Two layers of two query and two KV heads each. Head 0 is the previous-token head in layer 0, the induction head
    in layer 1; head 1 attends to near tokens and writes a little of what it reads into numbers of its own.

    Hidden size ``4 * CODE``: the token's code, the previous token's, the recalled one's, and what heads 1 write.
    """
    config = ModelConfig(
        model_type="llama", vocab_size=vocabulary, hidden_size=4 * CODE, intermediate_size=8, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, head_dim=DIM, max_position_embeddings=context,
        attention_bias=True, rope_parameters={"rope_type": "default", "rope_theta": 1e9}, tie_word_embeddings=False,
    )  # fmt: skip
    model = Llama.random(config, std=0.0, dtype=dtype)
    codes = torch.randn(vocabulary, CODE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    codes /= codes.norm(dim=1, keepdim=True)
    token, previous, recalled, other = (slice(i * CODE, (i + 1) * CODE) for i in range(4))
    # An RMSNorm multiplies a state of norm n by sqrt(hidden size) / n.
    gain0, gain1 = math.sqrt(4 * CODE), math.sqrt(4 * CODE / 2)
    with torch.no_grad():
        model.embed_tokens.weight[:, token] = codes.to(dtype)
        model.lm_head.weight[:, recalled] = codes.to(dtype)
        for i, gain in enumerate((gain0, gain1)):
            attention: Any = model.layers[i].self_attn
            q, k, v = attention.qkv_proj.weight.view(3, 2, DIM, -1)
            bias_q, bias_k, _ = attention.qkv_proj.bias.view(3, 2, DIM)
            out = attention.o_proj.weight.view(-1, 2, DIM)
            v[:, torch.arange(CODE), torch.arange(CODE)] = 1 / gain
            if i == 0:
                bias_q[0], bias_k[0] = _turned(1.0, PREVIOUS * math.sqrt(DIM) / len(_FAST))
                out[previous, 0, :CODE] = torch.eye(CODE, dtype=dtype)
            else:
                scale = math.sqrt(INDUCTION * math.sqrt(DIM)) / gain
                q[0, _CONTENT, torch.arange(CODE)] = scale
                k[0, _CONTENT, CODE + torch.arange(CODE)] = scale
                out[recalled, 0, :CODE] = torch.eye(CODE, dtype=dtype)
            bias_q[1], bias_k[1] = _turned(0.0, 4 * math.sqrt(DIM) / len(_FAST))
            out[other, 1, :CODE] = 0.1 * torch.eye(CODE, dtype=dtype)
    return model


def _turned(back: float, size: float) -> tuple[torch.Tensor, torch.Tensor]:
    """A query and a key whose score is largest where the key stands ``back`` positions before the query:
    ``size * sum cos(theta (distance - back))`` over the fast planes."""
    angles = -back * 1e9 ** (-2 * _FAST.double() / DIM)
    query, key = torch.zeros(DIM, dtype=torch.float64), torch.zeros(DIM, dtype=torch.float64)
    query[_FAST], query[_FAST + DIM // 2] = angles.cos() * size, angles.sin() * size
    key[_FAST] = 1.0
    return query, key
