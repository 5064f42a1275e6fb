"""Low-rank updates: nothing at first, what their weight says later, and ordinary weights once merged."""

from __future__ import annotations

import pytest
import torch
from effops.models import Llama
from effops.nn import Linear, RMSNorm
from effops.systems.lora import LoRALinear, add_lora_, merge_lora_
from hypothesis import given
from hypothesis import strategies as st
from strategies.values import normal
from tiny import TINY


def layer(outputs: int, inputs: int, **options) -> LoRALinear:
    base = Linear(inputs, outputs, bias=True, dtype=torch.float64)
    with torch.no_grad():
        base.weight.copy_(normal(outputs, inputs, dtype=torch.float64))
        base.bias.copy_(normal(outputs, dtype=torch.float64, seed=1))
    return LoRALinear(base, 2, **options)


@given(st.sampled_from([None, (9,), (4, 3, 2)]), st.booleans(), st.booleans(), st.booleans(), st.booleans())
def test_it_is_a_layer_with_another_weight(parts, updated, normed, gated, added):
    lora = layer(9, 6, alpha=5.0, parts=parts or ())
    if updated:
        with torch.no_grad():
            lora.up.copy_(normal(9, 2, dtype=torch.float64, seed=2))
    norm = RMSNorm(6, dtype=torch.float64)
    with torch.no_grad():
        norm.weight.copy_(normal(6, dtype=torch.float64, seed=3))
    x, residual = (normal(3, 4, n, dtype=torch.float64, seed=n) for n in (12 if gated else 6, 9))
    arguments = (residual if added else None, norm if normed and not gated else None, gated)
    got = lora(x, *arguments)
    downs = lora.down.split(2)
    rows = torch.cat([up @ down for up, down in zip(lora.up.split(list(lora.parts)), downs, strict=True)])
    plain = Linear(6, 9, bias=True, dtype=torch.float64)
    with torch.no_grad():
        plain.weight.copy_(lora.base.weight + 2.5 * rows)
        plain.bias.copy_(lora.base.bias)
        assert torch.allclose(got, plain(x, *arguments))
        assert updated != torch.equal(plain.weight, lora.base.weight)
        assert torch.allclose(lora.merged()(x, *arguments), got)


def test_only_updates_embedding_and_norms_are_trained():
    model = Llama.random(TINY, std=0.2, dtype=torch.float64)
    tokens = torch.randint(0, TINY.vocab_size, (2, 20), generator=torch.Generator().manual_seed(0))
    before, frozen = model(tokens).detach(), {n: p.clone() for n, p in model.named_parameters()}
    trained = add_lora_(model, 3)
    assert torch.allclose(model(tokens), before)
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    assert all(n.endswith((".down", ".up")) or "norm" in n or n.startswith("embed_tokens") for n in names)
    assert len(trained) == len(names) == 3 * (4 + 2) + 1 + 1  # (two updates of two, two norms) a layer

    optimizer = torch.optim.Adam(trained, lr=1e-2)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0] - 0.1
    for name, parameter in model.named_parameters():
        if name not in names:
            assert torch.equal(parameter, frozen[name.replace(".base", "")]), name

    after = model(tokens).detach()
    merge_lora_(model)
    assert torch.allclose(model(tokens), after) and type(model.layers[0].self_attn.qkv_proj) is Linear
    assert set(dict(model.named_parameters())) == set(frozen) and all(p.requires_grad for p in model.parameters())
    assert not torch.equal(model.layers[1].self_attn.qkv_proj.weight, frozen["layers.1.self_attn.qkv_proj.weight"])


def test_every_update_is_drawn_by_itself():
    downs = []
    for seed in (0, 1):
        model = Llama.random(TINY)
        add_lora_(model, 3, seed=seed)
        downs += [x for name, x in model.named_parameters() if name.endswith(".down")]
    assert len(downs) == 12
    assert not any(
        torch.equal(x[:3], y[:3]) for i, x in enumerate(downs) for y in downs[:i] if x.shape[1] == y.shape[1]
    )


def test_wrong_arguments():
    with pytest.raises(ValueError, match="LoRALinear: rank: expected 1 or more, got 0"):
        LoRALinear(Linear(4, 6), 0)
    with pytest.raises(ValueError, match=r"LoRALinear: parts: expected sizes that sum to 6, got \(2, 3\)"):
        LoRALinear(Linear(4, 6), 2, parts=(2, 3))
