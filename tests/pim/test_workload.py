"""Workloads and models: lengths as published, traces as they are found, wrong ones are named errors."""

from __future__ import annotations

import json
import statistics

import pytest
from effops.pim import ModelShape, Workload
from effops.pim.model import shipped
from effops.pim.workload import SHIPPED


@pytest.mark.parametrize("name", ["sharegpt", "alpaca"])
def test_lengths_have_the_published_means(name: str) -> None:
    """The means of the data behind the quantiles, but for what the longest request cuts off."""
    prompt, output = json.loads((SHIPPED / f"{name}.json").read_text())["means"]
    work = Workload.named(name, 20_000)
    assert statistics.fmean(work.prompt) == pytest.approx(prompt, rel=0.06)
    assert statistics.fmean(work.output) == pytest.approx(output, rel=0.03)
    assert max(p + o for p, o in zip(work.prompt, work.output, strict=True)) <= 2048
    assert work == Workload.named(name, 20_000) != Workload.named(name, 20_000, seed=1)


def test_a_snapshot_finds_long_answers_anywhere_in_them() -> None:
    work = Workload.fixed(10, 100, 4000).warm(2000)
    assert statistics.fmean(work.generated[:2000]) == pytest.approx(50, rel=0.05)
    assert set(work.generated[2000:]) == {0}
    mixed = Workload([0.0] * 2, [1, 1], [10, 90], [0, 0]).warm(2000)
    assert statistics.fmean(mixed.output[:2000]) == pytest.approx(0.1 * 10 + 0.9 * 90, rel=0.05)


def test_arrivals() -> None:
    work = Workload.fixed(10, 10, 4000).poisson(8)
    assert list(work.arrival_s) == sorted(work.arrival_s)
    assert work.arrival_s[-1] == pytest.approx(500, rel=0.1)
    with pytest.raises(ValueError, match="per_second: expected above 0, got 0"):
        work.poisson(0)


def test_lengths_of_no_tokens() -> None:
    with pytest.raises(ValueError, match="workload: prompt: expected 1 or more tokens, got 0"):
        Workload.gaussian(0, 5, 3)
    with pytest.raises(ValueError, match="workload: output: expected 1 or more tokens, got -2"):
        Workload.gaussian(5, -2, 3)
    with pytest.raises(ValueError, match="request 1: expected a prompt and an output of 1 or more tokens"):
        Workload.fixed(0, 5, 3)


@pytest.mark.parametrize(
    "name, text",
    [
        ("a.csv", "arrival_s,prompt_tokens,output_tokens\n5,10,3\n6.5,20,4\n"),
        ("a.tsv", "input_toks\toutput_toks\n10\t3\n20\t4\n"),
        ("a.jsonl", '{"timestamp": 5, "prompt": 10, "output": 3}\n{"timestamp": 6.5, "prompt": 20, "output": 4}\n'),
        ("a.json", '[{"arrived_at": 5, "prompt": 10, "output": 3}, {"arrived_at": 6.5, "prompt": 20, "output": 4}]'),
        ("a.csv", "\ufeffarrival_timestamp,prompt_size,token_size\n5,10,3\n6.5,20,4\n"),
        ("a.csv", "timestamp,prompt,output\n2024-05-10T00:00:00Z,10,3\n2024-05-10 00:00:01.500000+00:00,20,4\n"),
        ("a.csv", "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:00:00.0,10,3\n2023-11-16 18:00:01.5,20,4\n"),
    ],
)
def test_traces(name: str, text: str, tmp_path) -> None:
    (tmp_path / name).write_text(text)
    work = Workload.file(tmp_path / name)
    assert (work.prompt, work.output) == ([10, 20], [3, 4])
    assert list(work.arrival_s) == ([0, 0] if name == "a.tsv" else [0, 1.5])


@pytest.mark.parametrize(
    "text, words",
    [
        ("prompt,output\n", "expected requests, got none"),
        ("prompt,answers\n1,2\n", "expected a column output_tokens or output"),
        ("arrival_ms,prompt,output\n1,2,3\n", "expected times in a column arrival_s or"),
        ("prompt,output\n1,two\n", "request 1: expected numbers"),
        ("prompt,output\n1,0\n", "request 1: expected a prompt and an output of 1 or more tokens"),
    ],
)
def test_wrong_traces(text: str, words: str, tmp_path) -> None:
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(ValueError) as error:
        Workload.file(tmp_path / "a.csv")
    assert words in str(error.value)


PARAMETERS = {
    "gpt3-7b": 6.9, "gpt3-13b": 13.1, "gpt3-30b": 30.3, "gpt3-175b": 175, "mixtral-8x7b": 46.7, "glam-143b": 143,
    "grok-1": 314, "opt-66b": 66, "llama-3-70b": 70.6, "llama-2-7b": 6.7,
}  # fmt: skip


@pytest.mark.parametrize("name", shipped())
def test_shipped_models_have_their_published_sizes(name: str) -> None:
    """Billions of parameters, embeddings counted once more where they are tied."""
    m = ModelShape.load(name)
    attention = (2 * m.heads + 2 * m.kv_heads) * m.head_dim * m.hidden
    with_experts = m.layers // m.expert_period if m.experts else 0
    ffn = m.ffn_matrices * m.hidden * m.intermediate
    count = m.layers * attention + (m.layers - with_experts + with_experts * m.experts) * ffn + 2 * m.vocab * m.hidden
    assert count / 1e9 == pytest.approx(PARAMETERS[name], rel=0.05)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"hidden_size": None}, "hidden_size or n_embd or d_model: expected a positive integer, got nothing"),
        ({"num_hidden_layers": 0}, "num_hidden_layers: expected a positive integer, got 0"),
        ({"num_key_value_heads": 3}, "num_key_value_heads: expected a divisor of 8 heads, got 3"),
        ({"kv_lora_rank": 512}, "kv_lora_rank: expected none, which is not modelled, got 512"),
        ({"num_local_experts": 4}, "num_experts_per_tok: expected 1 to 4, got nothing"),
        ({"num_local_experts": 4, "num_experts_per_tok": 5}, "num_experts_per_tok: expected 1 to 4, got 5"),
    ],
)
def test_wrong_configurations(changes: dict, words: str) -> None:
    config = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 8, "vocab_size": 100, **changes}
    with pytest.raises(ValueError) as error:
        ModelShape.load({k: v for k, v in config.items() if v is not None})
    assert words in str(error.value)


def test_one_shared_kv_head() -> None:
    config = {
        "model_type": "falcon",
        "hidden_size": 4544,
        "num_hidden_layers": 32,
        "num_attention_heads": 71,
        "vocab_size": 65024,
    }
    assert ModelShape.load({**config, "multi_query": True}).kv_heads == 1
    assert ModelShape.load(config).kv_heads == 71


@pytest.mark.parametrize("text", ["[1, 2]", "{", '[{"prompt": 1'])
def test_wrong_json(text: str, tmp_path) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=r"a.json: expected (JSON|objects)"):
        Workload.file(tmp_path / "a.json")
