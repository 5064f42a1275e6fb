"""Transformers models with attn_implementation="effops" against the same weights with "eager"."""

from __future__ import annotations

import copy

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="the integration is with transformers")

from effops.integrations import transformers as integration  # noqa: E402

SIZES = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
ALTERNATING = ["sliding_attention", "full_attention", "sliding_attention"]
MODELS = {
    "llama": {},
    "mistral": {"sliding_window": 5},
    "qwen3": {
        "use_sliding_window": True,
        "sliding_window": 5,
        "layer_types": ALTERNATING,
    },
    "gemma2": {"sliding_window": 5, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 16},
    "gemma3_text": {"sliding_window": 5, "layer_types": ALTERNATING, "query_pre_attn_scalar": 16},
    "gpt2": {"scale_attn_by_inverse_layer_idx": True},
}
GPT2_NAMES = {
    "hidden_size": "n_embd",
    "intermediate_size": "n_inner",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions",
}


@pytest.fixture(scope="module", params=MODELS)
def pair(request):
    """The same weights twice: eager and effops."""
    integration.register()
    fields = {**SIZES, **MODELS[request.param]}
    if request.param == "gpt2":
        fields = {GPT2_NAMES.get(k, k): v for k, v in fields.items()}
        del fields["num_key_value_heads"], fields["head_dim"]
    config = transformers.AutoConfig.for_model(request.param, **fields)
    eager = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, p in eager.named_parameters():
            if "norm" in name or "ln_" in name:
                p.uniform_(0.5, 1.5, generator=generator)
            else:
                p.normal_(0.0, 0.3, generator=generator)
    ours = copy.deepcopy(eager)
    ours.set_attn_implementation("effops")
    assert ours.config._attn_implementation == "effops"
    return eager, ours


def tokens(batch=2, count=17, seed=0):
    return torch.randint(2, 99, (batch, count), generator=torch.Generator().manual_seed(seed))


def close(ours, eager):
    torch.testing.assert_close(ours, eager, rtol=2e-4, atol=2e-4 * float(eager.abs().max()))


@torch.no_grad()
def test_prefill(pair):
    eager, ours = pair
    x = tokens()
    close(ours(x).logits, eager(x).logits)
    assert not torch.equal(ours(x).logits, eager(x).logits)  # another implementation did run


@torch.no_grad()
def test_decode_with_a_cache(pair):
    eager, ours = pair
    x = tokens()
    caches = [model(x[:, :9], use_cache=True).past_key_values for model in pair]
    for i in range(9, 17, 2):
        theirs = eager(x[:, i : i + 2], past_key_values=caches[0]).logits
        close(ours(x[:, i : i + 2], past_key_values=caches[1]).logits, theirs)


@torch.no_grad()
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generate_with_left_padding(pair, cache):
    eager, ours = pair
    x = tokens(batch=3)
    mask = torch.ones_like(x)
    for row, padding in enumerate((0, 4, 11)):
        x[row, :padding], mask[row, :padding] = 0, 0
    options = {
        "attention_mask": mask,
        "max_new_tokens": 8,
        "do_sample": False,
        "cache_implementation": cache,
        "output_logits": True,
        "return_dict_in_generate": True,
        "disable_compile": True,
    }
    mine, theirs = ours.generate(x, **options), eager.generate(x, **options)
    assert torch.equal(mine.sequences, theirs.sequences)
    for a, b in zip(mine.logits, theirs.logits, strict=True):
        close(a, b)


@torch.no_grad()
def test_right_padding_of_whole_sequences(pair):
    eager, ours = pair
    x, mask = tokens(), torch.ones(2, 17, dtype=torch.int64)
    mask[1, 12:] = 0
    mine, theirs = ours(x, attention_mask=mask).logits, eager(x, attention_mask=mask).logits
    close(mine[0], theirs[0])
    close(mine[1, :12], theirs[1, :12])


def test_gradients(pair):
    grads = []
    for model in pair:
        model.zero_grad()
        model(tokens()).logits.logsumexp(-1).sum().backward()
        grads.append({n: p.grad for n, p in model.named_parameters()})
    for name, theirs in grads[0].items():
        assert (grads[1][name] - theirs).abs().max() <= 1e-3 * theirs.abs().max() + 1e-6, name


@pytest.fixture(scope="module")
def llama():
    """A model for the faults."""
    integration.register()
    config = transformers.AutoConfig.for_model("llama", **SIZES)
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="effops").eval()


@pytest.mark.parametrize(
    "mask, words",
    [
        ([1, 1, 0, 1, 1], "one run of real tokens a row, got a gap"),
        ([0, 1, 0, 1, 0], "one run of real tokens a row, got a gap"),
    ],
)
def test_gaps_are_refused(llama, mask, words):
    with pytest.raises(ValueError, match=f"effops: attention_mask: expected {words}"):
        llama(tokens(1, 5), attention_mask=torch.tensor([mask]))


def test_right_padding_before_a_decode_step_is_refused(llama):
    mask = torch.tensor([[1, 1, 1, 1, 0]])
    past = llama(tokens(1, 5), attention_mask=mask, use_cache=True).past_key_values
    mask = torch.tensor([[1, 1, 1, 1, 0, 0]])
    with pytest.raises(ValueError, match="expected padding on the left, got padding on the right"):
        llama(tokens(1, 1), attention_mask=mask, past_key_values=past)


def test_a_row_of_padding_alone_is_zero_attention_not_nan(llama):
    mask = torch.tensor([[1, 1, 1], [0, 0, 0]])
    assert torch.isfinite(llama(tokens(2, 3), attention_mask=mask).logits).all()


def test_dense_masks_are_refused(llama):
    dense = torch.zeros(1, 1, 5, 5)
    with pytest.raises(ValueError, match=r"got a dense mask of shape \[1, 1, 5, 5\]"):
        llama(tokens(1, 5), attention_mask=dense)


def test_packed_sequences_are_refused(llama):
    positions = torch.tensor([[0, 1, 2, 0, 1]])
    with pytest.raises(ValueError, match=r"effops: mask: expected a causal, .* \(packed sequences"):
        llama(tokens(1, 5), position_ids=positions, use_cache=False)


def test_dropout_and_attention_weights_are_refused(llama):
    q = torch.zeros(1, 4, 3, 8)
    for options, words in (
        ({"dropout": 0.1}, "dropout: expected 0, got 0.1"),
        ({"output_attentions": True}, "output_attentions: expected None, got bool"),
        ({"position_bias": q}, "position_bias: expected None, got Tensor"),
    ):
        with pytest.raises(ValueError, match=f"effops: {words}"):
            integration.attention_forward(torch.nn.Module(), q, q, q, None, **options)


def test_sinks_reach_the_op():
    q = torch.randn(1, 4, 3, 8)
    sinks = torch.tensor([0.0, 1.0, -1.0, 5.0])
    out, _ = integration.attention_forward(torch.nn.Module(), q, q, q, None, s_aux=sinks)
    scores = (q @ q.mT * 8**-0.5).masked_fill(~torch.ones(3, 3, dtype=torch.bool).tril(), -torch.inf)
    weights = torch.cat([scores, sinks.view(1, 4, 1, 1).expand(1, 4, 3, 1)], -1).softmax(-1)[..., :-1]
    torch.testing.assert_close(out, (weights @ q).transpose(1, 2), rtol=1e-5, atol=1e-5)
