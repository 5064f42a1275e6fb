"""SinkLoRA: positions are interpolated, tuning attends as it says and gives an ordinary model, the run keeps what it
tuned."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from effops import cli
from effops.cache import HeavyHitterLayer
from effops.models import Llama
from effops.nn import Linear
from effops.systems import sinklora
from effops.systems.context_tuning import Tuning, interpolated, token_losses, tune
from effops.systems.lora import add_lora_, merge_lora_
from effops.systems.quality import Measured
from effops.systems.runner import Run
from effops.systems.shifted_attention import shifted_group_attention
from effops.systems.sinklora import TUNINGS
from strategies.values import normal
from tiny import TINY
from torch import Tensor


def tokens(batch: int, count: int) -> Tensor:
    return torch.randint(0, TINY.vocab_size, (batch, count), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model() -> Llama:
    return Llama.random(TINY, std=0.2, dtype=torch.float64)


def test_interpolated_positions_are_as_many_times_closer(model):
    longer = interpolated(model, 4)
    assert longer.config.context_length == 4 * model.config.context_length
    for far, near in zip(longer.rotary.tables(160, longer.device), model.rotary.tables(40, model.device), strict=True):
        assert torch.allclose(far[: 4 * 40 : 4], near[:40], atol=1e-6) and not torch.allclose(far[1:40], near[1:40])
    mine = model.state_dict()
    assert all(torch.equal(x, mine[name]) for name, x in longer.state_dict().items())
    assert longer.embed_tokens.weight.data_ptr() != model.embed_tokens.weight.data_ptr()
    with pytest.raises(
        ValueError, match="interpolated: model: expected plain rotary positions, got rope_type 'linear'"
    ):
        interpolated(longer, 2)


@pytest.mark.parametrize(
    "tuning, options",
    [
        (TUNINGS[0], {"group_size": 32}),
        (TUNINGS[1], {"group_size": 8, "shift_heads": 1, "num_sinks": 4}),
        (TUNINGS[2], {"group_size": 8, "shift_heads": 2, "wraparound": True}),
    ],
    ids=lambda x: getattr(x, "name", ""),
)
def test_what_each_tuning_sees(tuning, options):
    q, k, v = (normal(2, 32, heads, 8, dtype=torch.float64, seed=heads) for heads in (4, 2, 2))
    assert torch.allclose(tuning.attend(8)(q, k, v), shifted_group_attention(q, k, v, **options))


def test_tuning_lowers_the_loss_and_gives_an_ordinary_model(model):
    text = tokens(2, 40)
    before = float(token_losses(model, text).mean())
    with torch.no_grad():
        assert before == pytest.approx(float(F.cross_entropy(model(text)[:, :-1].flatten(0, 1), text[:, 1:].flatten())))
    frozen = model.layers[0].mlp.gate_up_proj.weight.clone()
    add_lora_(model)
    losses = tune(model, [text] * 6, TUNINGS[0].attend(10), learning_rate=1e-2, warm_up=2)
    merge_lora_(model)
    # The first loss is that of the untouched model, by another path.
    assert losses[0] == pytest.approx(before, rel=1e-6) and losses == sorted(losses, reverse=True)
    assert float(token_losses(model, text).mean()) < losses[-1]
    assert torch.equal(model.layers[0].mlp.gate_up_proj.weight, frozen)
    assert type(model.layers[0].self_attn.qkv_proj) is Linear and all(p.requires_grad for p in model.parameters())


def test_one_group_is_full_attention(model):
    other = Llama.random(TINY, std=0.2, dtype=torch.float64)
    text = [tokens(2, 24)] * 3
    one, full = (
        tune(of, text, tuning.attend(24), learning_rate=1e-2, warm_up=0)
        for of, tuning in ((model, Tuning("one group", 8)), (other, TUNINGS[0]))
    )
    assert full == pytest.approx(one, rel=1e-9)


@pytest.fixture
def small(monkeypatch):
    for name, value in {
        "STEPS": 2, "SEEDS": 2, "EVALUATED": 3, "STRETCH": 50, "DECODED": 2, "SCORED": 3,
    }.items():  # fmt: skip
        monkeypatch.setattr(sinklora, name, value)
    for module, extra in (("rich", "tables"), ("matplotlib", "drawings"), ("tokenizers", "texts")):
        pytest.importorskip(module, reason=f"the command's {extra} need {module}")


def run(tiny_dir, *more: str) -> int:
    return cli.main(["systems", "run", "sinklora", "--model", str(tiny_dir), *more])


def test_tables_figures_and_a_drawing(tiny_dir, tmp_path, capsys, store, small, monkeypatch):
    files = ["--json", str(tmp_path / "a.json"), "--plot", str(tmp_path / "a.png")]
    assert run(tiny_dir, *files) == 0
    out = capsys.readouterr().out
    (report,) = json.loads((tmp_path / "a.json").read_text())["reports"]
    assert report["problems"] == [] and report["verdict"] in out and "tuning with SF-Attn, 2 of 2" in out
    losses, decoded = report["tables"]
    assert [row[0] for row in losses["rows"]] == ["as it is", "interpolated", *(t.name for t in TUNINGS)]
    start = losses["rows"][1][2]
    for row in losses["rows"]:
        assert row[3] is None if row[0] == "interpolated" else row[3] == pytest.approx(row[2] - start)
    assert losses["rows"][2][5] in (None, "100% to 100%")
    full, *rows = decoded["rows"]
    # Of 160 tokens; a mass and a position of 4 bytes beside the 128 of a key and a value.
    assert [(row[0], row[1]) for row in rows] == [(x, n) for x in ("H2O", "first 4 and last") for n in (10, 20, 40, 80)]
    assert [row[5] for row in rows[:4]] == pytest.approx([n / 160 * full[5] * 136 / 128 for n in (10, 20, 40, 80)])
    by_position, by_entries = report["curves"]
    assert [at for at, _ in by_position["lines"]["SF-Attn"]] == [0, 50, 100, 150]
    assert by_entries["lines"]["H2O"] == [[row[1], row[2]] for row in rows[:4]]
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")

    monkeypatch.setattr(sinklora, "tune", lambda *_, **__: pytest.fail("tuned again"))
    assert run(tiny_dir, *files[:2]) == 0
    assert json.loads((tmp_path / "a.json").read_text())["reports"][0]["tables"] == report["tables"]


def test_what_was_trained_is_kept_and_nothing_else(tiny_dir, store, small):
    load_file = pytest.importorskip("safetensors.torch", reason="the store keeps safetensors files").load_file
    assert run(tiny_dir) == 0
    kept = [load_file(str(path)) for path in store.iterdir()]
    assert len(kept) == len(TUNINGS) * 2  # seeds
    ends = (".down", ".up", "norm.weight", "embed_tokens.weight")
    assert all(name.endswith((*ends, "layernorm.weight")) for tensors in kept for name in tensors)
    assert all(len(tensors) == TINY.num_hidden_layers * (2 * 2 + 2) + 2 for tensors in kept)
    downs = [tensors["layers.0.self_attn.qkv_proj.down"] for tensors in kept]
    assert not any(torch.equal(x, y) for i, x in enumerate(downs) for y in downs[:i])


def test_a_cache_that_holds_everything_and_is_not_full_is_a_failure(tiny_dir, small, monkeypatch, capsys):
    attend = HeavyHitterLayer.attend
    monkeypatch.setattr(HeavyHitterLayer, "attend", lambda *a, **options: attend(*a, **options).flip(2))
    assert run(tiny_dir) == 1
    assert "H2O's cache that holds everything is" in capsys.readouterr().out


def of_seeds(*losses: float) -> list[Measured]:
    """Three files each, that differ by more than tunings do."""
    return [Measured([x - 1, x, x + 1]) for x in losses]


@pytest.mark.parametrize(
    "full, sinks, shifted, expected, told",
    [
        ((2.0, 2.0), (2.05, 2.06), (2.5, 2.4), "seen", (True, True)),
        ((2.0, 2.0), (2.5, 2.5), (2.6, 2.7), "partly seen", (True, True)),
        ((2.0, 2.0), (2.2, 2.2), (2.1, 2.1), "not seen", (True, True)),
        ((2.0, 2.0), (2.05, 2.05), (2.5, 2.04), "not seen", (True, False)),  # of both signs
        ((2.0, 2.1), (2.1, 2.0), (2.5, 2.4), "seen", (False, True)),
        ((3.2, 3.2), (3.3, 3.3), (3.4, 3.4), "not seen", (True, True)),
    ],
)
def test_verdicts(full, sinks, shifted, expected, told):
    beyond = {"as it is": of_seeds(1.9), "interpolated": of_seeds(3.0)}
    beyond |= {t.name: of_seeds(*x) for t, x in zip(TUNINGS, (full, sinks, shifted), strict=True)}
    verdict, said = sinklora._judged(beyond)
    assert verdict == expected and f"SF-Attn {3 - sum(sinks) / 2:.3f}" in said
    first, second = (part for part in said.split(";")[1].split(", ") if "above" in part)
    assert ("(not told apart)" not in first, "(not told apart)" not in second) == told


def test_a_difference_within_its_error_is_none():
    noisy = [Measured([1.0, 2.0, 3.5]), Measured([1.0, 2.0, 3.4])]
    assert sinklora._apart(noisy, of_seeds(2.0, 2.0)) == 0
    assert sinklora._apart(of_seeds(2.1, 2.1), of_seeds(2.0, 2.0)) == 1
    assert sinklora._apart(of_seeds(2.0, 2.0), of_seeds(2.1, 2.1)) == -1


def test_windowed_models_are_refused():
    windowed = Llama.random(replace(TINY, windows=(8, 8, 8)))
    with pytest.raises(
        ValueError, match=r"sinklora: model: expected layers that see every key, got others \(windowed\)"
    ):
        sinklora.run(Run(lambda: (windowed, None), "windowed"))  # type: ignore[arg-type,return-value]
