"""Transformers models with experts_implementation="effops" against the same weights with "eager"."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="the integration is with transformers")

from effops.integrations import transformers as integration  # noqa: E402
from effops.integrations.experts import _gate_of, experts_forward  # noqa: E402

SIZES = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "num_experts_per_tok": 2,
}
MODELS = {
    "mixtral": {"num_local_experts": 6},
    "qwen3_moe": {"num_experts": 6, "moe_intermediate_size": 20, "norm_topk_prob": True},
    "olmoe": {"num_experts": 6},
    "gpt_oss": {"num_local_experts": 6, "sliding_window": 5},
    "deepseek_v3": {
        "num_key_value_heads": 4,
        "n_routed_experts": 6,
        "head_dim": 4,
        "moe_intermediate_size": 20,
        "first_k_dense_replace": 1,
        "n_group": 2,
        "topk_group": 1,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4,
        "v_head_dim": 8,
    },
}


@pytest.fixture(scope="module", params=MODELS)
def pair(request):
    """The same weights twice: eager and effops experts, both with eager attention."""
    integration.register()
    config = transformers.AutoConfig.for_model(request.param, **{**SIZES, **MODELS[request.param]})
    eager = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation="eager", experts_implementation="eager"
    ).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, p in eager.named_parameters():
            if "norm" in name:
                p.uniform_(0.5, 1.5, generator=generator)
            else:
                p.normal_(0.0, 0.3, generator=generator)
    ours = copy.deepcopy(eager)
    ours.set_experts_implementation("effops")
    assert ours.config._experts_implementation == "effops" != eager.config._experts_implementation
    return eager, ours


def tokens(batch=2, count=17, seed=0):
    return torch.randint(2, 99, (batch, count), generator=torch.Generator().manual_seed(seed))


def close(ours, eager):
    torch.testing.assert_close(ours, eager, rtol=2e-4, atol=2e-4 * float(eager.abs().max()))


@torch.no_grad()
def test_logits(pair, monkeypatch):
    eager, ours = pair
    calls, plain = [], integration.ops.fused_experts
    monkeypatch.setattr(integration.ops, "fused_experts", lambda *a, **k: calls.append(1) or plain(*a, **k))
    x = tokens()
    close(ours(x).logits, eager(x).logits)
    layers = ours.config.num_hidden_layers - (1 if ours.config.model_type == "deepseek_v3" else 0)
    assert len(calls) == layers


@torch.no_grad()
def test_bfloat16(pair):
    """Within a few roundings of the float32 logits, relative to the largest."""
    exact = pair[0](tokens()).logits
    ours = copy.deepcopy(pair[1]).to(torch.bfloat16)
    eager = copy.deepcopy(pair[0]).to(torch.bfloat16)
    error = (ours(tokens()).logits.float() - exact).square().mean()
    theirs = (eager(tokens()).logits.float() - exact).square().mean()
    assert ours(tokens()).logits.dtype == torch.bfloat16
    assert error <= 4 * theirs  # mean squares: single routes may flip where bfloat16 makes a tie


def test_autocast(pair):
    """bfloat16 products of float32 weights, whose gradients are float32."""
    eager, ours = pair
    exact = eager(tokens()).logits.detach()
    ours.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        mine, theirs = ours(tokens()).logits, eager(tokens()).logits
    mine.float().logsumexp(-1).sum().backward()
    assert all(p.grad is None or p.grad.dtype == torch.float32 for p in ours.parameters())
    errors = [(logits.detach().float() - exact).square().mean() for logits in (mine, theirs)]
    assert 0 < errors[0] <= 4 * errors[1]


@torch.no_grad()
def test_compiles_whole(pair):
    """Without graph breaks, although the gating is found by trying."""
    ours = copy.deepcopy(pair[1])
    for module in ours.modules():
        module.__dict__.pop("_effops_gate", None)
    compiled = torch.compile(ours.model, fullgraph=True, backend="aot_eager")
    close(ours.lm_head(compiled(tokens()).last_hidden_state), pair[1](tokens()).logits)


@torch.no_grad()
def test_greedy_generation(pair):
    eager, ours = pair
    options = {"max_new_tokens": 12, "do_sample": False}
    assert torch.equal(ours.generate(tokens(1), **options), eager.generate(tokens(1), **options))


@torch.no_grad()
def test_panels(pair):
    """The same numbers from weights in panels, which take the parameters' place and are not saved."""
    eager, ours = pair[0], copy.deepcopy(pair[1])
    layers = ours.config.num_hidden_layers - (1 if ours.config.model_type == "deepseek_v3" else 0)
    assert integration.pack_experts_(ours) == layers
    assert not any(n.endswith(("gate_up_proj", "down_proj")) for n, p in ours.named_parameters() if p.dim() == 3)
    close(ours(tokens()).logits, eager(tokens()).logits)
    assert torch.equal(ours.generate(tokens(1), max_new_tokens=6), eager.generate(tokens(1), max_new_tokens=6))
    with pytest.raises(RuntimeError, match="Experts: state_dict: expected experts with parameters, got weights in"):
        ours.state_dict()
    with pytest.raises(ValueError, match="expected a floating tensor"):
        integration.pack_experts_(ours)


def test_panels_of_other_models(pair):
    with pytest.raises(ValueError, match=r"expected a model with experts_implementation effops, got .* with eager"):
        integration.pack_experts_(pair[0])
    with pytest.raises(ValueError, match="got Linear with no experts"):
        integration.pack_experts_(torch.nn.Linear(2, 2))


def test_gradients(pair):
    """In training mode, for every parameter, the router's among them."""
    grads = []
    for model in pair:
        model.train().zero_grad()
        model(tokens()).logits.logsumexp(-1).sum().backward()
        grads.append({n: p.grad for n, p in model.named_parameters()})
        model.eval()
    assert any("experts" in name for name in grads[0])
    for name, theirs in grads[0].items():
        assert (grads[1][name] - theirs).abs().max() <= 1e-3 * theirs.abs().max() + 1e-6, name


def experts(**changes):
    """A module as Transformers makes them; silu, gated, [E, out, in]."""
    generator = torch.Generator().manual_seed(1)
    fields = {
        "has_gate": True,
        "has_bias": False,
        "has_post_expert_norm": False,
        "is_transposed": False,
        "is_concatenated": True,
        "_is_expert_parallel": False,
        "num_experts": 3,
        "act_fn": torch.nn.SiLU(),
        **changes,
    }

    class Experts(torch.nn.Module):
        def _apply_gate(self, x):
            gate, up = x.chunk(2, -1)
            return self.act_fn(gate) * up

    module = Experts()
    for name, value in fields.items():
        setattr(module, name, value)
    rows = 16 if fields["has_gate"] else 8
    first = torch.randn(3, rows, 5, generator=generator)
    last = torch.randn(3, 5, 8, generator=generator)
    if fields["is_transposed"]:
        first, last = first.mT.contiguous(), last.mT.contiguous()
    setattr(module, "gate_up_proj" if fields["has_gate"] else "up_proj", torch.nn.Parameter(first))
    module.down_proj = torch.nn.Parameter(last)
    return module


def call(module, ids):
    x = torch.randn(len(ids), 5, generator=torch.Generator().manual_seed(2))
    ids = torch.tensor(ids)
    return experts_forward(module, x, ids, torch.full(ids.shape, 0.5)), x


ACTIVATIONS = {
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "relu2": lambda x: torch.relu(x).square(),
}


@torch.no_grad()
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_flags_and_activations(name, gated, transposed):
    act = ACTIVATIONS[name]
    module = experts(act_fn=act, has_gate=gated, is_transposed=transposed)
    out, x = call(module, [[0], [2], [2]])
    assert _gate_of(module) == (name, False)
    for row, e in enumerate((0, 2, 2)):
        first = module.gate_up_proj[e] if gated else module.up_proj[e]
        last = module.down_proj[e]
        hidden = x[row] @ (first if transposed else first.T)
        hidden = act(hidden[:8]) * hidden[8:] if gated else act(hidden)
        close(out[row], 0.5 * (hidden @ (last if transposed else last.T)))


@torch.no_grad()
def test_experts_of_other_processes_contribute_nothing():
    module = experts(_is_expert_parallel=True)
    both, _ = call(module, [[1, 3], [3, 3]])
    alone, _ = call(module, [[1], [1]])
    close(both[0], alone[0])
    assert torch.equal(both[1], torch.zeros(5))


def test_what_the_op_does_not_have_is_refused():
    for changes, words in (
        ({"has_post_expert_norm": True}, "expected experts without a norm after them"),
        ({"act_fn": torch.nn.functional.mish}, "expected a gating of silu, gelu, gelu_tanh, relu2, swiglu_oai"),
        ({"act_fn": torch.tanh, "has_gate": False}, r"got another one \(act_fn"),
    ):
        with pytest.raises(ValueError, match=f"effops: Experts: .*{words}"):
            call(experts(**changes), [[0]])
    module = experts()
    del module.gate_up_proj
    module.gate_up_proj = torch.zeros(3, 16, 5, dtype=torch.int8)
    with pytest.raises(ValueError, match=r"Experts\.gate_up_proj: expected a floating tensor"):
        call(module, [[0]])


def test_gpt_oss_gates_are_told_by_their_constants():
    oss = pytest.importorskip("transformers.models.gpt_oss.modeling_gpt_oss", reason="needs GPT-OSS")
    config = SimpleNamespace(
        intermediate_size=8, num_local_experts=3, hidden_size=5, swiglu_alpha=1.702, swiglu_limit=7.0
    )
    assert _gate_of(oss.GptOssExperts(config)) == ("swiglu_oai", True)
    for name, value in (("swiglu_alpha", 1.5), ("swiglu_limit", 6.0)):
        changed = oss.GptOssExperts(SimpleNamespace(**{**vars(config), name: value}))
        with pytest.raises(ValueError, match=r"GptOssExperts: expected a gating of .*GptOssExperts\._apply_gate"):
            _gate_of(changed)
