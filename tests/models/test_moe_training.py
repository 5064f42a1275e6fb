"""Training the mixture-of-experts model: effops' ops follow the reference's loss; the trainer's own parts are right."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from effops.models import shipped

pytest.importorskip("transformers", reason="the model that is trained is transformers'")
pytest.importorskip("tokenizers", reason="needed to read tokenizer.json")

TOOLS = Path(__file__).resolve().parents[2] / "tools"
SIZES = {"hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 16}
STEPS, ROWS, LENGTH = 30, 4, 64
# The two sum in different orders: a loss is off by a few roundings of float32, 2^-24 each, and so is what a step hands
# on, for nothing in the model or in the optimizers amplifies it. 32 of them; a fault of 5 % is far more.
BOUND = 2**-19


@pytest.fixture(scope="module")
def tools():
    """The trainer's modules, which are scripts beside each other and import by bare names."""
    before, path = set(sys.modules), list(sys.path)
    sys.path.insert(0, str(TOOLS / "train_moe_model"))
    import compare
    import experts
    import muon

    yield {"compare": compare, "experts": experts, "muon": muon}
    sys.path[:] = path
    for name in set(sys.modules) - before:
        if str(TOOLS) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def batches(tools):
    """Held-out text as rows of inputs and targets."""
    compare = tools["compare"]
    documents = compare.encode_documents(
        compare.code_tokenizer(), [path.read_text(encoding="utf-8") for path in shipped.heldout_files()[1:3]]
    )
    stream = torch.from_numpy(documents[0]), torch.from_numpy(documents[1])
    ids = torch.cat(stream)[: STEPS * ROWS * LENGTH + 1]
    rows = ids[:-1].view(STEPS, ROWS, LENGTH), ids[1:].view(STEPS, ROWS, LENGTH)
    return list(zip(*rows, strict=True))


@pytest.fixture(scope="module")
def reference(tools):
    """The loss curve of Transformers' own loop over experts."""
    return tools["compare"].loss_curve("eager", tools["compare"].code_tokenizer(), batches(tools), **SIZES)


def difference(tools, reference, experts):
    curve = tools["compare"].loss_curve(experts, tools["compare"].code_tokenizer(), batches(tools), **SIZES)
    return tools["compare"].largest_difference(reference, curve)


@pytest.mark.parametrize("experts", ["effops", "sorted"])
def test_the_loss_follows_the_reference(tools, reference, experts):
    assert reference[-1] < reference[0] - 0.5  # it does learn
    assert difference(tools, reference, experts) <= BOUND


@pytest.mark.parametrize("fault, factor", [("weights", 50), ("choice", 1000)])
def test_a_fault_would_show(tools, reference, monkeypatch, fault, factor):
    """Weights 5 % too large; every token's second choice lost."""
    from effops import ops

    plain = ops.fused_experts

    def faulty(x, gate_up, down, weights, ids, **options):
        weights = 1.05 * weights if fault == "weights" else weights
        ids = ids if fault == "weights" else torch.cat([ids[:, :1], torch.full_like(ids[:, 1:], -1)], 1)
        return plain(x, gate_up, down, weights, ids, **options)

    monkeypatch.setattr(ops, "fused_experts", faulty)
    assert difference(tools, reference, "effops") > factor * BOUND


def test_stacked_muon_is_muon_of_each_matrix(tools):
    generator = torch.Generator().manual_seed(0)
    stack = torch.nn.Parameter(torch.randn(3, 8, 6, generator=generator))  # each two matrices [4,6]
    single = [torch.nn.Parameter(m.clone()) for m in stack.detach().reshape(6, 4, 6)]
    options = {"lr": 0.1, "weight_decay": 0.2, "momentum": 0.9}
    ours = tools["muon"].StackedMuon([{"params": [stack], "parts": 2}], **options)
    theirs = torch.optim.Muon(single, adjust_lr_fn="match_rms_adamw", **options)
    for _ in range(4):
        stack.grad = torch.randn(3, 8, 6, generator=generator)
        for p, grad in zip(single, stack.grad.reshape(6, 4, 6), strict=True):
            p.grad = grad.clone()
        ours.step()
        theirs.step()
    step = 0.1 * 0.2 * 6**0.5
    expected = torch.stack([p.detach() for p in single]).view_as(stack)
    assert (stack.detach() - expected).abs().max() <= 4 * step * 2**-6  # bfloat16 iterations, batched or not


def test_sorted_experts_have_the_gradients_of_a_loop(tools):
    generator = torch.Generator().manual_seed(1)
    n, d, f, e = 50, 12, 8, 5
    x, gate_up, down = (torch.randn(*s, generator=generator) for s in ((n, d), (e, 2 * f, d), (e, d, f)))
    weights = torch.rand(n, 2, generator=generator)
    ids = torch.randint(0, e - 1, (n, 2), generator=generator)  # an expert without tokens, and duplicates
    leaves = [t.requires_grad_() for t in (x, gate_up, down, weights)]
    weight = torch.randn(n, d, generator=generator)

    out = tools["experts"].experts(*leaves, ids)[0]
    grads = torch.autograd.grad((out * weight).sum(), leaves)
    expected = torch.zeros(n, d)
    for i in range(e):
        gate, up = (x @ gate_up[i].T).chunk(2, -1)
        share = (weights * (ids == i)).sum(1, keepdim=True)
        expected = expected + share * ((torch.nn.functional.silu(gate) * up) @ down[i].T)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    for grad, theirs in zip(grads, torch.autograd.grad((expected * weight).sum(), leaves), strict=True):
        torch.testing.assert_close(grad, theirs, rtol=1e-4, atol=1e-4)
