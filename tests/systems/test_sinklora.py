"""SinkLoRA: positions are interpolated, tuning attends as it says and gives an ordinary model, the run keeps what it
tuned."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from effops import cli
from effops.models import Llama
from effops.nn import Linear
from effops.systems import sinklora
from effops.systems.quality import Measured
from effops.systems.runner import Run
from effops.systems.shifted_attention import shifted_group_attention
from effops.systems.sinklora import TUNINGS, Tuning, interpolated, token_losses, tune
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
    losses = tune(model, [text] * 6, TUNINGS[0].attend(10), learning_rate=1e-2)
    # The first loss is that of the untouched model, by another path.
    assert losses[0] == pytest.approx(before, rel=1e-6) and losses == sorted(losses, reverse=True)
    assert float(token_losses(model, text).mean()) < losses[-1]
    assert type(model.layers[0].self_attn.qkv_proj) is Linear and all(p.requires_grad for p in model.parameters())


def test_one_group_is_full_attention(model):
    other = Llama.random(TINY, std=0.2, dtype=torch.float64)
    text = [tokens(2, 24)] * 3
    one = tune(model, text, Tuning("one group", 8).attend(24))
    assert tune(other, text, TUNINGS[0].attend(6)) == pytest.approx(one, rel=1e-9)


@pytest.fixture
def small(monkeypatch):
    for name, value in {"STEPS": 2, "EVALUATED": 2, "STRETCH": 100}.items():
        monkeypatch.setattr(sinklora, name, value)


def test_tables_figures_and_a_drawing(tiny_dir, tmp_path, capsys, store, small, monkeypatch):
    for module, extra in (("rich", "tables"), ("matplotlib", "drawings"), ("tokenizers", "texts")):
        pytest.importorskip(module, reason=f"the command's {extra} need {module}")
    arguments = ["systems", "run", "sinklora", "--model", str(tiny_dir), "--json", str(tmp_path / "a.json")]
    assert cli.main([*arguments, "--plot", str(tmp_path / "a.png")]) == 0
    out = capsys.readouterr().out
    (report,) = json.loads((tmp_path / "a.json").read_text())["reports"]
    assert report["verdict"] in out and "tuning with SF-Attn" in out
    (table,), (curves,) = report["tables"], report["curves"]
    assert [row[0] for row in table["rows"]] == ["as it is", "interpolated", *(t.name for t in TUNINGS)]
    start = table["rows"][1][2]
    for row in table["rows"]:
        assert row[3] is None if row[0] == "interpolated" else row[3] == pytest.approx(row[2] - start)
    assert [at for at, _ in curves["lines"]["SF-Attn"]] == [0, 100, 200, 300]  # of twice 160 tokens
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG") and len(list(store.iterdir())) == len(TUNINGS)
    monkeypatch.setattr(sinklora, "tune", lambda *_, **__: pytest.fail("tuned again"))
    assert cli.main(arguments) == 0
    assert json.loads((tmp_path / "a.json").read_text())["reports"][0]["tables"] == [table]


@pytest.mark.parametrize(
    "losses, expected",
    [
        ((2.0, 2.05, 2.5), "seen"),
        ((2.0, 2.5, 2.6), "partly seen"),
        ((2.0, 2.1, 2.05), "not seen"),
        ((3.2, 3.1, 3.3), "not seen"),
    ],
)
def test_verdicts(losses, expected):
    beyond = {"as it is": Measured([4.0]), "interpolated": Measured([3.0])}
    beyond |= {t.name: Measured([x]) for t, x in zip(TUNINGS, losses, strict=True)}
    verdict, said = sinklora._judged(beyond)
    assert verdict == expected and f"SF-Attn {3 - losses[1]:.3f}" in said


def test_windowed_models_are_refused():
    windowed = Llama.random(replace(TINY, windows=(8, 8, 8)))
    with pytest.raises(
        ValueError, match=r"sinklora: model: expected layers that see every key, got others \(windowed\)"
    ):
        sinklora.run(Run(windowed, None, "windowed"))  # type: ignore[arg-type]
