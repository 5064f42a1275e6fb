"""Gates of retrieval heads: their gradient, what they mean at both ends, and that they find the head that retrieves."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from effops import reference
from effops.models import Llama
from effops.systems.induction import induction_model
from effops.systems.quality import recall_accuracy
from effops.systems.retrieval_heads import RetrievalHeadFinder, choose_heads, trapezoid
from effops.systems.texts import recall_of_tokens
from hypothesis import given
from hypothesis import strategies as st
from strategies.values import normal
from tiny import TINY
from torch import Tensor


def tokens(batch: int, count: int, vocabulary: int = TINY.vocab_size, seed: int = 0) -> Tensor:
    return torch.randint(0, vocabulary, (batch, count), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def exact(request) -> Llama:
    config = replace(TINY, model_type=request.param, qk_norm=request.param == "qwen3")
    return Llama.random(config, std=0.2, dtype=torch.float64)


def student(model: Llama, gates: Tensor, text: Tensor, num_sinks: int, recent: int) -> tuple[Tensor, Tensor]:
    """The two passes side by side in plain PyTorch."""
    c, count = model.config, text.shape[1]
    cos, sin = model.rotary.tables(count, text.device)
    positions = torch.arange(count).int().expand(len(text), -1)

    def norm(x: Tensor, of: torch.nn.Module) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + of.eps) * of.weight

    both = [F.embedding(text, model.embed_tokens.weight)] * 2
    for layer, gate in zip(model.layers, gates.double(), strict=True):
        own = layer.self_attn
        outs: list[Tensor] = []
        for i, x in enumerate(both):
            qkv = F.linear(norm(x, layer.input_layernorm), own.qkv_proj.weight).unflatten(-1, (-1, c.head_dim))
            q, k, v = qkv.split((c.num_attention_heads, c.num_key_value_heads, c.num_key_value_heads), 2)
            if own.q_norm is not None:
                q, k = norm(q, own.q_norm), norm(k, own.k_norm)
            q, k = (reference.rotary(part, cos, sin, positions) for part in (q, k))
            if i == 0:
                outs.append(reference.attention(q, k, v, causal=True))
                continue
            stream = reference.attention(q, k, v, causal=True, window=recent, num_sinks=num_sinks)
            share = gate.repeat_interleave(2)[:, None]
            outs.append((1 - share) * stream + share * outs[0].detach())
        for i, out in enumerate(outs):
            x = both[i] + F.linear(out.flatten(2), own.o_proj.weight)
            gate_x, up = F.linear(norm(x, layer.post_attention_layernorm), layer.mlp.gate_up_proj.weight).chunk(2, -1)
            both[i] = x + F.linear(F.silu(gate_x) * up, layer.mlp.down_proj.weight)
    return norm(both[0], model.norm).detach(), norm(both[1], model.norm)


def test_loss_and_gradient_are_those_of_plain_pytorch(exact):
    text, supervised = tokens(2, 40), torch.rand(2, 40, generator=torch.Generator().manual_seed(1)) < 0.3
    finder = RetrievalHeadFinder(exact, num_sinks=2, recent=7)
    with torch.no_grad():
        finder.gates.copy_(torch.tensor([[0.2, 0.9], [0.5, 0.1], [0.7, 0.4]]))
    loss = finder.loss(text, supervised, penalty=0.3)
    loss.backward()
    gates = finder.gates.detach().double().requires_grad_()
    teacher, mixed = student(exact, gates, text, 2, 7)
    expected = (mixed - teacher).square().mean(-1)[supervised].mean() + 0.3 * gates.mean()
    (gradient,) = torch.autograd.grad(expected, gates)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert torch.allclose(finder.gates.grad.double(), gradient, rtol=1e-5, atol=1e-7)
    assert gradient.abs().min() > 1e-4


def test_open_gates_are_the_model_and_closed_ones_its_streaming_cache(exact):
    text, finder = tokens(2, 50), RetrievalHeadFinder(exact, num_sinks=3, recent=9)
    with torch.no_grad():
        teacher, mixed = finder(text)
        assert torch.allclose(teacher, exact.hidden_states(text)) and torch.allclose(mixed, teacher)
        assert finder.loss(text, torch.ones(2, 50, dtype=torch.bool), penalty=0.25).item() == pytest.approx(0.25)
        finder.gates.zero_()
        teacher, mixed = finder(text)
        cache = exact.new_streaming_cache(2, 50, window=9, num_sinks=3, step_tokens=8)
        assert torch.allclose(mixed, exact.hidden_states(text, cache))
    assert not torch.allclose(mixed, teacher)


def test_gates_are_clamped_where_they_are_used(exact):
    text, finder = tokens(1, 30), RetrievalHeadFinder(exact, num_sinks=0, recent=4)
    with torch.no_grad():
        finder.gates.copy_(torch.tensor([[1.5, -3.0]] * 3))
        beyond = finder(text)[1]
        finder.gates.clamp_(0, 1)
        assert torch.equal(finder(text)[1], beyond)


def multi_key(count: int = 192, pairs: int = 3) -> Iterator[tuple[Tensor, Tensor]]:
    """Random tokens, with pairs of a key and three tokens in them that are all repeated at the end."""
    for seed in range(1000):
        generator = torch.Generator().manual_seed(seed)
        row = torch.randint(0, 128, (1, count), generator=generator)
        keys = (128 + torch.randperm(128, generator=generator)[: 4 * pairs]).view(pairs, 4)
        supervised = torch.zeros(1, count, dtype=torch.bool)
        for i, key in enumerate(keys):
            at, again = 1 + 40 * i + int(torch.randint(0, 30, (), generator=generator)), count - 4 * (pairs - i)
            row[0, at : at + 4] = row[0, again : again + 4] = key
            supervised[0, again : again + 3] = True
        yield row, supervised


def test_the_head_that_retrieves_keeps_its_gate():
    """And recall stays with it alone, in the memory that one of four heads takes."""
    model = induction_model(256)
    gates = RetrievalHeadFinder(model, num_sinks=4, recent=24).train_gates(multi_key(), 100, learning_rate=0.05)
    assert gates[1, 0] > 0.9 and gates.flatten()[[0, 1, 3]].max() < 0.5
    assert all(p.requires_grad and p.grad is None for p in model.parameters())

    task, found = recall_of_tokens(256, 16, 400), choose_heads(gates, 0.75)
    assert found.tolist() == [[False, False], [True, False]]
    accuracy, nbytes = {}, {}
    for name, full in {"found": found, "another": found.flip(1), "all": torch.ones_like(found)}.items():
        options = {"window": 24, "full_heads": full, "step_tokens": 8}
        accuracy[name] = recall_accuracy(model, lambda b, c, o=options: model.new_streaming_cache(b, c, **o), task)
        nbytes[name] = model.new_streaming_cache(8, 404, **options).nbytes
    assert accuracy["found"] == accuracy["all"] == 1 and accuracy["another"] < 0.3
    slots = 16 + 32  # of a streaming head: a page of sinks, a ring of 23 + 8 tokens in whole pages
    assert nbytes["found"] / nbytes["all"] == pytest.approx((3 * slots + 416) / (4 * 416))


def test_a_failed_training_leaves_the_model_trainable():
    def broken() -> Iterator[tuple[Tensor, Tensor]]:
        yield next(multi_key())
        raise KeyboardInterrupt

    model = induction_model(256)
    with pytest.raises(KeyboardInterrupt):
        RetrievalHeadFinder(model).train_gates(broken(), 5)
    assert all(p.requires_grad for p in model.parameters())


def test_learning_rates_rise_and_fall():
    assert [trapezoid(s, 10) for s in range(10)] == pytest.approx([0.5, *[1.0] * 8, 0.5])
    factors = [trapezoid(s, 100) for s in range(100)]
    assert factors[:3] == pytest.approx([0.1, 0.1, 0.15]) and factors[19:81] == [1.0] * 62
    assert factors[97:] == pytest.approx([0.15, 0.1, 0.1])


@given(st.integers(1, 6), st.integers(1, 5), st.floats(0, 1), st.integers(0, 9))
def test_heads_are_chosen_by_a_quantile(layers, heads, sparsity, seed):
    gates = normal(layers, heads, dtype=torch.float64, seed=seed)  # no two are equal
    expected = gates >= torch.quantile(gates, sparsity) - 1e-12
    assert choose_heads(gates, sparsity).tolist() == (expected & (sparsity < 1)).tolist()


@given(st.integers(1, 5), st.integers(1, 5), st.floats(0, 1), st.data())
def test_equal_gates_are_told_apart_by_place(layers, heads, sparsity, data):
    values = data.draw(st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=layers * heads, max_size=layers * heads))
    gates = torch.tensor(values).view(layers, heads)
    kept = choose_heads(gates, sparsity)
    assert kept.sum() == choose_heads(torch.arange(layers * heads).float().view(layers, heads), sparsity).sum()
    order = sorted(range(layers * heads), key=lambda i: (-values[i], i))
    assert kept.flatten().nonzero()[:, 0].tolist() == sorted(order[: int(kept.sum())])


def test_wrong_arguments():
    model = Llama.random(replace(TINY, windows=(None, 8, None)))
    with pytest.raises(ValueError, match="RetrievalHeadFinder: model: expected layers that see every key, got windows"):
        RetrievalHeadFinder(model)
    with pytest.raises(
        ValueError, match="RetrievalHeadFinder: num_sinks, recent: expected 0 or more and 1 or more, got 4, 0"
    ):
        RetrievalHeadFinder(Llama.random(TINY), num_sinks=4, recent=0)
    with pytest.raises(ValueError, match=r"choose_heads: sparsity: expected a number in \[0, 1\], got 1.5"):
        choose_heads(torch.ones(2, 2), 1.5)
    with pytest.raises(ValueError, match="choose_heads: gates: expected finite numbers"):
        choose_heads(torch.tensor([[1.0, torch.nan]]), 0.5)
