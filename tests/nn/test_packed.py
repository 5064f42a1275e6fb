"""Modules with packed weights: what their layer says, in any model, saved and loaded, with gradients to inputs."""

from __future__ import annotations

import effops
import pytest
import torch
from effops import ops
from effops.models import Llama, ModelConfig
from effops.nn import Linear, MoE, PackedLinear, RMSNorm, quantize_
from strategies.values import normal, same_bits
from torch import nn
from torch.nn.utils import prune

FORMATS = ("int8", "int4")


def config(**changes) -> ModelConfig:
    sizes = {
        "model_type": "llama", "vocab_size": 50, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    }  # fmt: skip
    return ModelConfig.from_dict(sizes | changes)


@pytest.mark.parametrize("format", FORMATS)
def test_the_layer_is_the_op(format):
    linear = Linear(48, 20, bias=True)
    with torch.no_grad():
        linear.weight.copy_(normal(20, 48))
        linear.bias.copy_(normal(20, seed=1))
    packed = PackedLinear.from_linear(linear, format, group_size=16)
    assert (packed.in_features, packed.out_features) == (48, 20) and format in repr(packed)
    x, residual, norm = normal(3, 48, seed=2), normal(3, 20, seed=3), RMSNorm(48)
    with torch.no_grad():
        norm.weight.copy_(normal(48, seed=4))
        weight = ops.pack_weight(linear.weight, format, group_size=16)
        assert same_bits(packed(x, residual), ops.packed_linear(x, weight, linear.bias, residual=residual))
        expected = ops.packed_linear(x, weight, linear.bias, norm=norm.weight, norm_eps=norm.eps)
        assert same_bits(packed(x, None, norm), expected)


@pytest.mark.parametrize("format", FORMATS)
def test_gradients_pass_through(format):
    packed = PackedLinear.from_linear(nn.Linear(24, 10), format)
    x = normal(3, 24).requires_grad_()
    out = packed(x)
    torch.testing.assert_close(out, x @ packed.weight.dequantize().T + packed.bias)
    out.sum().backward()
    torch.testing.assert_close(x.grad, packed.weight.dequantize().sum(0).expand(3, -1))
    assert packed.bias.grad is not None and [name for name, _ in packed.named_parameters()] == ["bias"]


@pytest.mark.parametrize("symmetric", (True, False))
@pytest.mark.parametrize("format", FORMATS)
def test_any_model_and_its_state(format, symmetric):
    """Other modules than ours; a state that comes back bit for bit; the rest of the model untouched."""

    def build() -> nn.Sequential:
        inner = nn.Sequential(nn.Linear(32, 24, bias=False))
        return nn.Sequential(nn.Linear(16, 32), nn.GELU(), inner, nn.LayerNorm(24))

    torch.manual_seed(0)
    model, plain, other = build(), build(), build()
    x = normal(5, 16)
    with torch.no_grad():
        plain.load_state_dict(model.state_dict())
        report = quantize_(model, format, symmetric=symmetric)
        assert [r.name for r in report] == ["0", "2.0"] and [r.shape for r in report] == [(32, 16), (24, 32)]
        assert isinstance(model[0], PackedLinear) and isinstance(model[3], nn.LayerNorm)
        for mine, layer in ((model[0], plain[0]), (model[2][0], plain[2][0])):
            layer.weight.copy_(mine.weight.dequantize())
        out = model(x)
        torch.testing.assert_close(out, plain(x), rtol=1e-5, atol=1e-5)
        quantize_(other, format, symmetric=symmetric)
        other.load_state_dict(model.state_dict())
        assert same_bits(other(x), out)


def test_what_stays():
    model = nn.ModuleDict({"a": nn.Linear(8, 8), "lm_head": nn.Linear(8, 8), "twice": nn.Linear(8, 8)})
    model["again"] = model["twice"]
    model["tied"] = nn.Linear(8, 8)
    model["embedding"] = nn.Embedding(8, 8)
    model["tied"].weight = model["embedding"].weight
    quantize_(model, "int8")
    kinds = {name: type(module) for name, module in model.items()}
    assert kinds["a"] is PackedLinear and kinds["lm_head"] is nn.Linear and kinds["tied"] is nn.Linear
    assert model["twice"] is model["again"] and kinds["twice"] is PackedLinear
    with pytest.raises(ValueError, match="quantize_: odd: pack_weight: group_size: expected a multiple of 8 that"):
        quantize_(nn.ModuleDict({"even": nn.Linear(16, 8), "odd": nn.Linear(12, 8)}), "int4", group_size=16)


def test_what_is_packed_or_shared_stays():
    first, second = (MoE(16, 24, 4, 2) for _ in range(2))
    model = nn.ModuleDict({"a": nn.Linear(16, 8), "b": nn.Linear(16, 8), "first": first, "second": second})
    for p in model.parameters():
        nn.init.normal_(p)
    second.w_gate_up, second.w_down = first.w_gate_up, first.w_down
    alone = MoE(16, 24, 4, 2)
    for p in alone.parameters():
        nn.init.normal_(p)
    model["alone"] = alone
    assert [r.name for r in quantize_(model, "int8", skip=("b",))] == ["a", "alone.w_gate_up", "alone.w_down"]
    assert first.panels is second.panels is None
    assert [r.name for r in quantize_(model, "int8")] == ["b"]


def test_computed_weights():
    linear = prune.l1_unstructured(nn.Linear(16, 8), "weight", 0.5)
    model, x = nn.Sequential(linear), normal(3, 16)
    kept = linear.weight.detach().ne(0)
    quantize_(model, "int8")
    assert torch.equal(model[0].weight.dequantize().ne(0), kept) and model(x).isfinite().all()


def test_modules_of_torch():
    """One that reads the weights of its layers, and autocast."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0).eval()
    model, x = nn.TransformerEncoder(layer, 2), normal(2, 5, 16)
    with torch.no_grad():
        exact = model(x)
        assert len(quantize_(model, "int8")) == 4
        got = model(x)
        assert not torch.equal(got, exact) and (got - exact).norm() < 0.02 * exact.norm()
        with torch.autocast("cpu", torch.bfloat16):
            half = model(x)
    assert (half.float() - exact).norm() < 0.05 * exact.norm()
    weight = model.layers[0].linear1.weight
    assert (weight.dtype, weight.device) == (torch.float32, x.device)
    with pytest.raises(TypeError):
        torch.relu(weight)


def test_floating_formats_are_the_models():
    x = normal(3, 16)
    for format, dtype in (("f32", torch.float32), ("bf16", torch.bfloat16), ("f16", torch.float16)):
        model = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 4)).to(dtype)
        with torch.no_grad():
            layers = [(linear.weight.clone(), linear.bias.clone()) for linear in model]
            quantize_(model, format, skip=("1",))
            assert [type(layer) for layer in model] == [PackedLinear, nn.Linear]
            assert same_bits(model[0](x.to(dtype)), ops.packed_linear(x.to(dtype), *layers[0]))
        other = nn.Sequential(nn.Linear(16, 8)).to(torch.bfloat16 if dtype != torch.bfloat16 else torch.float16)
        with pytest.raises(ValueError, match=f"quantize_: 0: PackedLinear: format: expected .+ got {format} for torch"):
            quantize_(other, format)
        assert type(other[0]) is nn.Linear


def with_outliers() -> Llama:
    """A model some of whose channels are much larger than others, as those of large models are."""
    model = Llama.random(config(attention_bias=True, model_type="qwen2"), seed=3, std=0.2)
    with torch.no_grad():
        for layer in model.layers:
            for norm in (layer.input_layernorm, layer.post_attention_layernorm):
                norm.weight[::11] *= 30
            layer.self_attn.qkv_proj.bias.normal_(generator=torch.Generator().manual_seed(1))
    return model


def test_scaling_by_activations():
    tokens = torch.randint(0, 50, (4, 24), generator=torch.Generator().manual_seed(0))
    other = torch.randint(0, 50, (2, 24), generator=torch.Generator().manual_seed(1))
    model = with_outliers()
    exact = model(other).detach()
    errors = []
    for calibration in (None, tokens):
        model = with_outliers()
        effops.quantize_(model, "int4", group_size=8, calibration=calibration)
        assert type(model.layers[0].self_attn.o_proj) is PackedLinear
        errors.append(float((model(other).detach() - exact).norm() / exact.norm()))
    assert errors[1] < 0.7 * errors[0], errors


def test_scaling_alone_changes_nothing():
    from effops.nn.scaling import scale_

    tokens = torch.randint(0, 50, (2, 24), generator=torch.Generator().manual_seed(0))
    model = with_outliers()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    exact = model(tokens).detach()
    rounded = lambda w: ops.pack_weight(w, "int4", group_size=8).dequantize()  # noqa: E731
    assert scale_(model, tokens, rounded, lambda layer: True) == 8
    changed = [name for name, p in model.named_parameters() if not torch.equal(p, before[name])]
    assert any("input_layernorm" in n for n in changed) and any("down_proj" in n for n in changed)
    torch.testing.assert_close(model(tokens).detach(), exact, rtol=1e-4, atol=1e-4)
    assert not scale_(model, tokens, rounded, lambda layer: False)


@pytest.mark.parametrize("what", ("qkv weight", "gate_up weight", "norm", "qkv", "mlp"))
def test_what_is_shared_is_not_scaled(what):
    from effops.nn.scaling import scale_

    tokens = torch.randint(0, 50, (2, 24), generator=torch.Generator().manual_seed(0))
    model = with_outliers()
    first, second = model.layers
    if what == "qkv weight":
        second.self_attn.qkv_proj.weight = first.self_attn.qkv_proj.weight
    elif what == "gate_up weight":
        second.mlp.gate_up_proj.weight = first.mlp.gate_up_proj.weight
    elif what == "norm":
        second.input_layernorm = first.input_layernorm
    elif what == "qkv":
        second.self_attn.qkv_proj = first.self_attn.qkv_proj
    else:
        second.mlp = first.mlp
    exact = model(tokens).detach()
    rounded = lambda w: ops.pack_weight(w, "int4", group_size=8).dequantize()  # noqa: E731
    assert 0 < scale_(model, tokens, rounded, lambda layer: True) < 8
    torch.testing.assert_close(model(tokens).detach(), exact, rtol=1e-4, atol=1e-4)


def test_samples_are_of_all_positions():
    from effops.nn.scaling import _Recorder

    recorder = _Recorder(Linear(1, 1), 17)
    with torch.no_grad():
        recorder.inner.weight.zero_()
        for _ in range(300):
            recorder(torch.arange(16.0)[None, :, None])
    rows = torch.cat(recorder.rows).flatten()
    assert len(rows) == -(-300 * 16 // 17) and len(set(rows.tolist())) == 16
    assert recorder.sizes.item() == 300 * 120


def test_states_of_other_formats_are_refused():
    def refused(into: nn.Module, state: dict, says: str) -> None:
        with pytest.raises(RuntimeError, match=says):
            into.load_state_dict(state)

    def linear(format: str, inputs: int = 16, **options) -> PackedLinear:
        return PackedLinear.from_linear(nn.Linear(inputs, 4, bias=False), format, **options)

    refused(linear("fp8_e4m3"), linear("int8").state_dict(), "PackedLinear: data: expected torch.float8_e4m3fn, got")
    refused(linear("int8", 8), linear("int8", 7).state_dict(), "PackedLinear: about: expected .4, 8, 8., got .4, 7, 7.")
    state = linear("int4", 32).state_dict()
    other = linear("int4", 32)
    other.load_state_dict(state)
    assert torch.equal(
        other.weight.dequantize(), PackedLinear(ops.PackedWeight.from_tensors(state)).weight.dequantize()
    )
    experts = [MoE(16, 24, 4, 2) for _ in range(2)]
    for moe, format in zip(experts, ("int8", "fp8_e4m3"), strict=True):
        for p in moe.parameters():
            nn.init.normal_(p)
        moe.pack_(format, group_size=8)
    refused(experts[1], experts[0].state_dict(), "Panels: panels.gate_up: expected torch.float8_e4m3fn, got torch.int8")


def test_frozen_biases_stay_frozen():
    layer = nn.Linear(16, 4).requires_grad_(False)
    packed = PackedLinear.from_linear(layer, "int8")
    assert not packed.bias.requires_grad and PackedLinear.from_linear(nn.Linear(16, 4), "int8").bias.requires_grad
    x = normal(2, 16)
    assert same_bits(packed(x), ops.packed_linear(x, packed.weight, packed.bias))


def test_bad_activations_are_refused():
    for format, activation in (("int8", "int3"), ("fp8_e4m3", "int8")):
        model = nn.Sequential(nn.Linear(16, 4))
        with pytest.raises(ValueError, match="PackedLinear: activation: expected None, or int8 beside int8 and int4"):
            effops.quantize_(model, format, activation=activation)
        assert type(model[0]) is nn.Linear


@pytest.mark.parametrize(
    ("options", "says"),
    [({"group_size": 48}, r"layers\.0\..+: pack_weight: group_size"),
     ({"activation": "int3"}, r"layers\.0\..+: PackedLinear: activation"),
     ({"format": "fp8_e4m3", "activation": "int8"}, r"layers\.0\..+: PackedLinear: activation"),
     ({"last": torch.nan}, r"layers\.1\.mlp\.down_proj: pack_weight: w: expected finite")],
)  # fmt: skip
def test_what_is_refused_changes_nothing(options, says):
    options = {"format": "int4"} | options
    model = with_outliers()
    with torch.no_grad():
        model.layers[1].mlp.down_proj.weight[3, 3] = options.pop("last", 1.0)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(ValueError, match=f"quantize_: {says}"):
        effops.quantize_(model, calibration=torch.zeros(1, 4, dtype=torch.int64), **options)
    assert all(same_bits(t, before[name]) for name, t in model.state_dict().items())


def test_calibration_takes_what_the_plain_call_takes():
    """A tied head of a width that groups do not divide stays."""
    model = Llama.random(config(tie_word_embeddings=True), seed=3, std=0.2)
    model.register_module("other", nn.Linear(20, 50))
    model.register_module("embedding", nn.Embedding(50, 20))
    model.other.weight = model.embedding.weight
    report = effops.quantize_(model, "int4", group_size=32, calibration=torch.zeros(1, 4, dtype=torch.int64))
    assert len(report) == 8 and type(model.other) is nn.Linear


def test_a_pinned_activation_is_noticed():
    tokens = torch.randint(0, 50, (1, 6), generator=torch.Generator().manual_seed(0))

    def step(model: Llama) -> torch.Tensor:
        with torch.no_grad():
            return model(tokens, model.new_cache(1, 6))

    models = [Llama.random(config(), seed=1, std=0.2) for _ in range(2)]
    for model, activation in zip(models, (None, "int8"), strict=True):
        effops.quantize_(model, "int8", activation=activation)
    plain = step(models[0])
    for module in models[0].modules():
        if isinstance(module, PackedLinear):
            module.activation = "int8"
    assert same_bits(step(models[0]), step(models[1])) and not torch.equal(step(models[0]), plain)


def test_export_and_cold_compile():
    torch._dynamo.reset()
    model = nn.Sequential(PackedLinear.from_linear(nn.Linear(16, 8), "int4")).eval()
    x = normal(3, 16)
    with torch.no_grad():
        assert same_bits(torch.compile(model, fullgraph=True)(x), model(x))
        assert same_bits(torch.export.export(model, (x,)).module()(x), model(x))


def test_activation_in_int8():
    model = Llama.random(config(), seed=1, std=0.2)
    tokens = torch.randint(0, 50, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        exact = model(tokens)
        effops.quantize_(model, "int8", activation="int8")
        linear, x = model.layers[0].mlp.down_proj, normal(3, 128)
        own = ops.packed_linear(x, linear.weight, gated=True, activation="int8")
        assert same_bits(linear(x, None, None, True), own)
        got = model(tokens, model.new_cache(2, 12))
    assert not torch.equal(got, exact) and (got - exact).norm() < 0.05 * exact.norm()


@pytest.mark.parametrize(("format", "options"), [("int8", {}), ("int4", {"group_size": 8}), ("fp8_e4m3", {})])
def test_experts(format, options):
    """They and the shared ones say what their dequantised weights say, and come back from a state bit for bit."""

    def build() -> MoE:
        torch.manual_seed(0)
        moe = MoE(16, 24, 4, 2, shared_size=40, bias=True)
        with torch.no_grad():
            for p in moe.parameters():
                p.normal_()
        return moe

    moe, plain, other = build(), build(), build()
    x = normal(9, 16)
    with torch.no_grad():
        names = [r.name for r in quantize_(moe, format, **options)]
        assert names == ["shared.gate_up_proj", "shared.down_proj", "w_gate_up", "w_down"]
        for name, form in zip(("w_gate_up", "w_down"), moe.panels.weights, strict=True):
            getattr(plain, name).copy_(form.dequantize())
        for name in ("gate_up_proj", "down_proj"):
            getattr(plain.shared, name).weight.copy_(getattr(moe.shared, name).weight.dequantize())
        out = moe(x)
        torch.testing.assert_close(out, plain(x), rtol=1e-4, atol=1e-3)
        quantize_(other, format, **options)
        for p in other.buffers():
            p.view(torch.uint8).zero_()
        other.load_state_dict(moe.state_dict())
        assert same_bits(other(x), out)
        half = moe.bfloat16()(x.bfloat16())
        assert half.dtype == torch.bfloat16 and (half.float() - out).norm() < 0.05 * out.norm()


@pytest.mark.parametrize("format", FORMATS)
def test_a_model_decodes(format):
    """Steps over a cache have the logits of the whole sequence, and those of a model with the weights as packed."""
    model, plain = (Llama.random(config(), seed=1, std=0.2) for _ in range(2))
    tokens = torch.randint(0, 50, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for report in effops.quantize_(model, format):
            plain.get_submodule(report.name).weight.copy_(model.get_submodule(report.name).weight.dequantize())
            assert report.nbytes < report.nbytes_before
        whole = model(tokens)
        assert model._whole.get() is not None, "one op decodes"
        cache = model.new_cache(2, 12)
        steps = torch.cat([model(tokens[:, :7], cache), *(model(tokens[:, i : i + 1], cache) for i in range(7, 12))], 1)
        torch.testing.assert_close(whole, plain(tokens), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(steps, whole, rtol=1e-4, atol=1e-4)
    assert type(model.lm_head) is Linear and type(model.layers[0].mlp.down_proj) is PackedLinear
