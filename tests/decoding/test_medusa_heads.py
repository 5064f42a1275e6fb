"""Medusa heads: shapes, the start at the model's own logits, files, with and without gradients, the loss."""

from __future__ import annotations

import json
import re

import pytest
import torch
import torch.nn.functional as F
from effops.decoding import MedusaHeads, medusa_loss
from effops.models import CheckpointError
from effops.models.checkpoint import SINGLE
from safetensors.torch import load_file, save_file

HIDDEN, VOCAB, HEADS = 48, 70, 3


def drawn(
    layers: int = 1, own: bool = False, dtype: torch.dtype = torch.float32, *, projection: bool = False, seed: int = 0
) -> MedusaHeads:
    """Heads with random weights."""
    heads = MedusaHeads(HIDDEN, HEADS, layers, VOCAB if own else None, projection=projection, dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.normal_(0.0, 0.3, generator=generator)
    return heads


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def plain(heads: MedusaHeads, hidden: torch.Tensor, lm_head: torch.Tensor | None) -> torch.Tensor:
    """Head by head, layer by layer, in float64."""
    logits = []
    for k in range(HEADS):
        z = hidden.double()
        for layer in range(heads.num_layers):
            z = z + F.silu(z @ heads.weight[layer, k].double().T + heads.bias[layer, k].double())
        if heads.projections is not None:
            z = z @ heads.projections[k].double().T
        weight = lm_head if heads.lm_heads is None else heads.lm_heads[k]
        logits.append(z @ weight.double().T)
    return torch.stack(logits)


@pytest.mark.parametrize("shape", [(HIDDEN,), (1, HIDDEN), (2, 5, HIDDEN), (40, HIDDEN), (0, HIDDEN)])
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_shapes(shape, own, grad):
    heads = drawn(2, own)
    with torch.set_grad_enabled(grad):
        logits = heads(normal(*shape), None if own else normal(VOCAB, HIDDEN))
    assert logits.shape == (HEADS, *shape[:-1], VOCAB)
    assert logits.requires_grad == grad


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_fresh_heads_give_the_models_logits(layers, projection, grad):
    hidden, lm_head = normal(7, HIDDEN), normal(VOCAB, HIDDEN)
    with torch.set_grad_enabled(grad):
        logits = MedusaHeads(HIDDEN, HEADS, layers, projection=projection)(hidden, lm_head)
    torch.testing.assert_close(logits, (hidden @ lm_head.T).expand(HEADS, -1, -1))


@pytest.mark.parametrize("rows", [1, 4, 30])
@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize(("own", "projection"), [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize(
    ("dtype", "error"), [(torch.float64, 1e-12), (torch.float32, 2e-5), (torch.float16, 0.02), (torch.bfloat16, 0.15)]
)
def test_both_paths_are_the_formula_within_rounding(rows, layers, own, projection, dtype, error):
    heads = drawn(layers, own, dtype, projection=projection)
    hidden, lm_head = normal(rows, HIDDEN, dtype=dtype), None if own else normal(VOCAB, HIDDEN, dtype=dtype, seed=2)
    expected = plain(heads, hidden, lm_head)
    scale = expected.square().mean().sqrt().item()
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            logits = heads(hidden, lm_head)
        assert logits.dtype == dtype
        assert (logits.double() - expected).abs().max().item() <= error * scale


def test_inference_mode_and_no_grad_agree_bit_for_bit():
    heads, hidden, lm_head = drawn(2), normal(3, HIDDEN), normal(VOCAB, HIDDEN)
    with torch.no_grad():
        expected = heads(hidden, lm_head)
    with torch.inference_mode():
        assert torch.equal(heads(hidden, lm_head), expected)


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_and_loaded_bit_for_bit(tmp_path, own, projection, dtype):
    heads = drawn(2, own, dtype, projection=projection)
    heads.acceptance = [[0.5, 0.25], [0.25, 0.125], [0.0, 1.0]]
    heads.save_pretrained(tmp_path, base_model_name_or_path="code-7m")
    loaded = MedusaHeads.from_pretrained(tmp_path)
    assert loaded.acceptance == heads.acceptance
    assert not loaded.training
    assert loaded.state_dict().keys() == heads.state_dict().keys()
    for name, tensor in heads.state_dict().items():
        assert loaded.state_dict()[name].dtype == dtype
        assert torch.equal(loaded.state_dict()[name], tensor)
    assert json.loads((tmp_path / "config.json").read_text())["base_model_name_or_path"] == "code-7m"
    assert MedusaHeads.from_pretrained(tmp_path, dtype=torch.float64).weight.dtype is torch.float64


def test_tensors_have_the_names_of_medusa_checkpoints(tmp_path):
    heads = drawn(2, own=True)
    heads.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / SINGLE)
    expected = {}
    for k in range(HEADS):
        for layer in range(2):
            expected[f"{k}.{layer}.linear.weight"] = heads.weight[layer, k]
            expected[f"{k}.{layer}.linear.bias"] = heads.bias[layer, k]
        expected[f"{k}.2.weight"] = heads.lm_heads[k]
    assert tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensors[name], tensor)
    shared = drawn(2, projection=True)
    shared.save_pretrained(tmp_path)
    names = {name for name in expected if "linear" in name} | {f"{k}.projection.weight" for k in range(HEADS)}
    assert load_file(tmp_path / SINGLE).keys() == names


def test_a_projection_is_an_own_lm_head():
    heads, lm_head, hidden = drawn(1, projection=True), normal(VOCAB, HIDDEN), normal(5, HIDDEN, seed=3)
    folded = MedusaHeads(HIDDEN, HEADS, 1, VOCAB)
    with torch.no_grad():
        folded.weight.copy_(heads.weight)
        folded.bias.copy_(heads.bias)
        folded.lm_heads.copy_(lm_head @ heads.projections)
        torch.testing.assert_close(folded(hidden), heads(hidden, lm_head), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("1.0.linear.weight"), ["1.0.linear.weight", "expected a tensor, got nothing"]),
        (lambda t: t.pop("2.1.weight"), ["2.1.weight", "expected a tensor, got nothing"]),
        (lambda t: t.update({"3.0.linear.weight": torch.zeros(1)}), ["3.0.linear.weight", "expected no such tensor"]),
        (lambda t: t.update({"0.1.linear.bias": torch.zeros(1)}), ["0.1.linear.bias", "3 heads of 1 layers"]),
        (
            lambda t: t.update({"0.0.linear.bias": torch.zeros(HIDDEN + 1)}),
            ["0.0.linear.bias", f"expected shape [{HIDDEN}], got [{HIDDEN + 1}]"],
        ),
        (lambda t: t.update({"1.projection.weight": torch.eye(HIDDEN)}), ["0.projection.weight", "got nothing"]),
        (lambda t: t.update({"0.1.weight": torch.zeros(9, HIDDEN)}), ["0.1.weight", f"expected shape [{VOCAB}"]),
    ],
)
def test_wrong_tensors_are_one_clear_line(tmp_path, change, words):
    drawn(1, own=True).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / SINGLE)
    change(tensors)
    save_file(tensors, tmp_path / SINGLE)
    with pytest.raises(CheckpointError, match=".*".join(map(re.escape, [SINGLE, *words]))) as caught:
        MedusaHeads.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("model_type", "llama", "expected 'medusa', got 'llama'"),
        ("hidden_size", None, "expected a positive integer, got nothing"),
        ("medusa_num_heads", 0, "expected a positive integer, got 0"),
        ("medusa_num_layers", "1", "expected a positive integer, got '1'"),
        ("vocab_size", None, "expected a positive integer, got nothing"),
        ("dtype", "int8", "expected a floating dtype, got 'int8'"),
        ("acceptance", [[0.5]], "expected 3 rows, one a head"),
        ("acceptance", [[0.5], [0.5], [1.5]], "expected shares from 0 to 1, got 1.5"),
    ],
)
def test_wrong_configuration_is_one_clear_line(tmp_path, field, value, words):
    drawn(1, own=True).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    raw = json.loads(path.read_text()) | {field: value}
    path.write_text(json.dumps({name: x for name, x in raw.items() if x is not None}))
    with pytest.raises(CheckpointError, match=".*".join(map(re.escape, ["config.json", field, words]))):
        MedusaHeads.from_pretrained(tmp_path)


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="num_heads: expected a positive integer, got 0"):
        MedusaHeads(HIDDEN, 0)
    heads, lm_head = drawn(), normal(VOCAB, HIDDEN)
    with pytest.raises(ValueError, match=r"hidden: expected shape \[\.\.\., 48\], got \[2, 47\]"):
        heads(normal(2, 47), lm_head)
    with pytest.raises(ValueError, match="lm_head: expected the model's"):
        heads(normal(2, HIDDEN))
    with pytest.raises(ValueError, match=r"lm_head: expected shape \[V, 48\], got \[70, 47\]"):
        heads(normal(2, HIDDEN), normal(VOCAB, 47))
    with pytest.raises(ValueError, match="lm_head: expected None"):
        drawn(own=True)(normal(2, HIDDEN), lm_head)
    with pytest.raises(ValueError, match=r"medusa_loss: tokens: expected shape \[B, T\]"):
        medusa_loss(normal(2, 5, HIDDEN), torch.zeros(2, 4, dtype=torch.int64), heads, lm_head)


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("length", [9, 4, 3, 2])
def test_loss_is_the_plain_loops(own, length):
    heads = drawn(2, own, torch.float64)
    hidden = normal(2, length, HIDDEN, dtype=torch.float64)
    lm_head = None if own else normal(VOCAB, HIDDEN, dtype=torch.float64, seed=2)
    tokens = torch.randint(VOCAB, (2, length), generator=torch.Generator().manual_seed(3))
    tokens[1, length // 2] = -100
    logits = plain(heads, hidden, lm_head)
    expected = torch.zeros((), dtype=torch.float64)
    for k in range(HEADS):
        nats = [
            -logits[k, b, t].log_softmax(-1)[tokens[b, t + 2 + k]]
            for b in range(2)
            for t in range(length - 2 - k)
            if tokens[b, t + 2 + k] >= 0
        ]
        if nats:
            expected = expected + 0.7**k * torch.stack(nats).mean()
    loss = medusa_loss(hidden, tokens, heads, lm_head, decay=0.7)
    torch.testing.assert_close(loss, expected)
    if length > 2:
        own_grads = torch.autograd.grad(loss, [heads.weight, heads.bias])
        for found, wanted in zip(own_grads, torch.autograd.grad(expected, [heads.weight, heads.bias]), strict=True):
            torch.testing.assert_close(found, wanted)


def test_a_few_steps_learn_a_repeating_text():
    tokens = (torch.arange(64) * 7 % 5).expand(2, -1)
    lm_head = normal(VOCAB, HIDDEN)
    hidden = lm_head[tokens]  # of a model that knows nothing but the last token
    heads = MedusaHeads(HIDDEN, HEADS)
    optimizer = torch.optim.Adam(heads.parameters(), lr=0.01)
    for _ in range(60):
        optimizer.zero_grad()
        medusa_loss(hidden, tokens, heads, lm_head).backward()
        optimizer.step()
    with torch.inference_mode():
        guesses = heads(hidden, lm_head).argmax(-1)
    for k in range(HEADS):
        assert torch.equal(guesses[k, :, : -2 - k], tokens[:, 2 + k :])


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_heads_that_look_at_the_root(tmp_path, own, grad):
    """R e is added to what the LM head reads; fresh heads do not look; files carry R; the root is asked for by name."""
    made = MedusaHeads(HIDDEN, HEADS, 1, VOCAB if own else None, projection=True, root=True)
    hidden, root, lm_head = normal(5, HIDDEN), normal(5, HIDDEN, seed=3), None if own else normal(VOCAB, HIDDEN)
    blind = MedusaHeads(HIDDEN, HEADS, 1, VOCAB if own else None, projection=True)
    assert torch.equal(made(hidden, lm_head, root=root), blind(hidden, lm_head))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(0.0, 0.3, generator=generator)
        without = plain(made, hidden, lm_head)
    with torch.set_grad_enabled(grad):
        got = made(hidden, lm_head, root=root)
    for k in range(HEADS):
        weight = lm_head if own is False else made.lm_heads[k]
        expected = without[k] + root.double() @ made.roots[k].double().T @ weight.double().T
        torch.testing.assert_close(got[k].double(), expected, rtol=1e-4, atol=1e-4)
    made.save_pretrained(tmp_path)
    loaded = MedusaHeads.from_pretrained(tmp_path)
    assert torch.equal(loaded.roots, made.roots) and "2.root.weight" in load_file(tmp_path / SINGLE)
    with pytest.raises(ValueError, match="MedusaHeads: root: expected the root's embedding, got None"):
        made(hidden, lm_head)
    with pytest.raises(ValueError, match="MedusaHeads: root: expected None, for the heads do not look at it, got a"):
        blind(hidden, lm_head, root=root)
    with pytest.raises(ValueError, match=r"MedusaHeads: root: expected shape \[5, 48\], got \[4, 48\]"):
        made(hidden, lm_head, root=root[:4])
    if not own:  # one head only
        with torch.no_grad():
            torch.testing.assert_close(
                made(hidden, lm_head, root=root, heads=1), got[:1].detach(), rtol=1e-4, atol=1e-4
            )
        with pytest.raises(ValueError, match="MedusaHeads: heads: expected 1 to 3, got 4"):
            made(hidden, lm_head, root=root, heads=4)


def test_loss_of_heads_that_look_at_the_root():
    made = MedusaHeads(HIDDEN, HEADS, root=True)
    with torch.no_grad():
        made.roots.normal_(0.0, 0.3, generator=torch.Generator().manual_seed(2))
    hidden, lm_head = normal(2, 9, HIDDEN), normal(VOCAB, HIDDEN)
    tokens = torch.randint(VOCAB, (2, 9), generator=torch.Generator().manual_seed(3))
    loss, root = 0.0, lm_head[tokens.roll(-1, 1)]
    logits = made(hidden, lm_head, root=root)
    for k in range(HEADS):
        last = 9 - 2 - k
        loss = loss + 0.8**k * F.cross_entropy(logits[k][:, :last].flatten(0, 1), tokens[:, 2 + k :].flatten())
    torch.testing.assert_close(medusa_loss(hidden, tokens, made, lm_head, embedding=lm_head), loss)
