"""The ops in torch's machinery: opcheck, torch.compile, autograd modes, Python threads, fork."""

from __future__ import annotations

import os
import threading
from typing import Any

import pytest
import torch
from backend import sized
from calls import CALLS, OPS, name_of, run
from effops import ops
from strategies.values import int32, normal, same_bits
from torch import Tensor

WITH_GRADIENT = (
    "attention", "grouped_mm", "merge_states", "moe_permute", "moe_unpermute", "topk_routing",
    "varlen_attention",
)  # fmt: skip
WITHOUT_OWN_GRADIENT = {("topk_routing", "bias")}  # of ops that have one in other inputs


@pytest.mark.parametrize("op", OPS, ids=name_of)
def test_opcheck(op):
    torch.library.opcheck(op, (), CALLS[name_of(op)]())


@pytest.mark.parametrize("name", WITH_GRADIENT)
def test_opcheck_with_gradients(name):
    call = CALLS[name]()
    for n, x in call.items():
        if isinstance(x, Tensor) and x.is_floating_point() and (name, n) not in WITHOUT_OWN_GRADIENT:
            x.requires_grad_()
    torch.library.opcheck(getattr(torch.ops.effops, name).default, (), call)


def every_op(x: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    """x [B,T,H,D]: a step of a decoder layer, the ragged and merging ops on its parts, draws from what comes out."""
    batch, tokens, _, dim = x.shape
    table = torch.linspace(0, 1, 12 * dim // 2).view(12, -1)
    turned = ops.rotary(ops.rms_norm(x, weight[0]), table.cos(), table.sin(), slots)
    ops.append_kv(k_cache, v_cache, turned[:, :, :2], x[:, :, :2], slots)
    lens = torch.full((batch,), 7, dtype=torch.int32)
    out, lse = ops.attention(turned, k_cache, v_cache, kv_lens=lens, causal=True, window=5, return_lse=True)
    joined, _ = ops.merge_states(torch.stack([out, x]), torch.stack([lse, 0 * lse]))
    gated = ops.silu_mul(ops.packed_linear(joined, weight, residual=None))
    offsets = torch.arange(batch + 1, dtype=torch.int32) * tokens
    ragged = ops.varlen_attention(*(t.flatten(0, 1) for t in (turned, x, x)), offsets, offsets, causal=True)
    drawn = ops.sample(x, torch.full(x.shape[:-1], 0.4, dtype=torch.float64), top_k=9, top_p=0.8)
    return gated, ragged, lse, drawn, ops.sampling_probs(gated, temperature=0.5)


def test_compile_every_op():
    """Without a graph break, with the same bits, caches written, and shapes that change."""
    compiled = torch.compile(every_op, fullgraph=True, dynamic=True)
    for batch, tokens in ((2, 3), (3, 4)):
        x, weight = normal(batch, tokens, 4, 16), normal(16, 16, seed=1)
        slots = torch.arange(tokens, dtype=torch.int32).expand(batch, -1) + 7 - tokens
        caches = [[normal(batch, 9, 2, 16, seed=s) for s in (2, 3)] for _ in range(2)]
        with torch.no_grad():
            expected = every_op(x, *caches[0], slots, weight)
            got = compiled(x, *caches[1], slots, weight)
        for a, b in zip((*expected, *caches[0]), (*got, *caches[1]), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)  # the compiler computes the tables its own way


def test_compile_verification():
    """Without a graph break, with the same results, and sizes that change."""

    def verify(parents: Tensor, drafts: Tensor, laws: Tensor, uniforms: Tensor) -> tuple[Any, ...]:
        rejection = ops.verify_rejection(parents, drafts, laws, laws.flip(0), uniforms, siblings="iid")
        greedy = ops.verify_greedy(parents, drafts, laws.argmax(-1))
        typical = ops.verify_typical(parents, drafts, laws, uniforms=uniforms[:, 0])
        return ops.pack_ancestors(parents), greedy, rejection, typical

    compiled = torch.compile(verify, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch, nodes in ((2, 3), (3, 5)):
        drafts = torch.arange(batch * nodes).view(batch, -1) % 4
        laws, uniforms = normal(batch, nodes, 4).softmax(-1), torch.full((batch, nodes + 1), 0.4, dtype=torch.float64)
        call = torch.arange(-1, nodes - 1, dtype=torch.int32)[None], drafts, laws, uniforms
        for got, expected in zip(compiled(*call), verify(*call), strict=True):
            assert type(got) is type(expected) and all(map(torch.equal, got, expected))


def experts(logits: Tensor, x: Tensor, up: Tensor, down: Tensor) -> tuple[Tensor, ...]:
    """A layer of experts, whole and in parts."""
    weights, ids = ops.topk_routing(logits, 2, scoring="sigmoid")
    xp, offsets, inverse = ops.moe_permute(x, ids, up.shape[0])
    h = ops.grouped_mm(xp, up.mT, offsets)
    parts = ops.moe_unpermute(ops.grouped_mm(h.chunk(2, 1)[0], down.mT, offsets), weights, inverse)
    return ops.fused_experts(x, up, down, weights, ids), parts, ops.load_balancing_loss(logits.softmax(-1), ids)


def test_compile_experts():
    """Without a graph break, with the same bits, gradients too, and numbers of tokens that change."""
    compiled = torch.compile(experts, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (5, 9):
        inputs = [normal(tokens, 4), normal(tokens, 12, seed=1), normal(4, 10, 12, seed=2), normal(4, 12, 5, seed=3)]
        with torch.no_grad():
            assert all(same_bits(a, b) for a, b in zip(compiled(*inputs), experts(*inputs), strict=True))
        gradients = []
        for call in (experts, compiled):
            tracked = [x.clone().requires_grad_() for x in inputs]
            gradients.append(torch.autograd.grad(sum(x.sum() for x in call(*tracked)), tracked))
        for a, b in zip(*gradients, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)  # sums in another order


def test_compile_gradients():
    def loss(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
        out, lse = ops.attention(q, k, v, causal=True, sink_logits=sinks, softcap=4.0, return_lse=True)
        return out.square().sum() + lse.sum()

    results = []
    for call in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        inputs = [normal(2, 5, 4, 8), normal(2, 9, 2, 8, seed=1), normal(2, 9, 2, 8, seed=2), normal(4, seed=3)]
        call(*(x.requires_grad_() for x in inputs)).backward()
        results.append([x.grad for x in inputs])
    assert all(same_bits(a, b) for a, b in zip(*results, strict=True))


def test_autograd_modes():
    """No graph where none is wanted; the same bits in every mode."""
    q, k = normal(1, 2, 2, 8), normal(1, 5, 1, 8, seed=1)
    plain = ops.attention(q, k, k)
    tracked = q.clone().requires_grad_()
    assert ops.attention(tracked, k, k).requires_grad and not plain.requires_grad
    with torch.no_grad():
        assert not ops.attention(tracked, k, k).requires_grad
    with torch.inference_mode():
        inside = ops.attention(tracked, k, k)
        assert inside.is_inference() and same_bits(inside, plain)
    assert same_bits(ops.attention(tracked, k, k).detach(), plain)


def work(seed: int) -> list[Tensor]:
    q, k, v = (normal(2, n, h, 32, seed=seed + n) for n, h in ((3, 4), (1500, 2), (1500, 2)))
    prefill = ops.attention(normal(1, 120, 4, 32, seed=seed), k[:1], v[:1], causal=True)
    linear = ops.packed_linear(q.flatten(0, 1).flatten(1), normal(300, 128, seed=seed))
    tracked = q.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(ops.attention(tracked, k, v).sum(), tracked)
    return [ops.attention(q, k, v), prefill, linear, ops.rms_norm(prefill, q[0, 0, 0]), gradient]


@pytest.mark.core
def test_two_python_threads():
    """Calls from two threads at once neither disturb each other's scratch memory nor each other's results."""
    expected = [work(seed) for seed in (1, 2)]
    torch.set_num_threads(2)
    wrong: list[Any] = []

    def repeat(which: int) -> None:
        try:
            for _ in range(sized(10, 1)):
                if not all(same_bits(a, b) for a, b in zip(work(which + 1), expected[which], strict=True)):
                    wrong.append(which)
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=repeat, args=(which,)) for which in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # forking with threads alive is the point
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_fork():
    """A child of a process that has used threads computes the same bits on one."""
    torch.set_num_threads(2)
    expected = work(3)
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        good = all(same_bits(a, b) for a, b in zip(work(3)[:-1], expected, strict=False))  # autograd cannot fork
        os._exit(0 if good else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_an_op_works_after_an_error():
    for op in OPS:
        call = CALLS[name_of(op)]()
        first = next(n for n, x in call.items() if isinstance(x, Tensor))
        for _ in range(3):
            with pytest.raises(RuntimeError):
                op(**{**call, first: int32(1)})
        assert all(x.isfinite().all() for x in run(op, call))
