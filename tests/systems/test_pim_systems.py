"""NeuPIMs and Duplex from the command line to their files, on few batches; claims, sensitivity and checks."""

from __future__ import annotations

import json

import pytest
from effops import cli
from effops.pim import System
from effops.systems import claims, duplex, neupims, pim_numerics
from effops.systems.claims import Claim

for module in ("rich", "matplotlib", "tokenizers"):
    pytest.importorskip(module, reason=f"the command's tables and drawings need {module}")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(neupims, "MODELS", {"gpt3-7b": 4})
    monkeypatch.setattr(neupims, "BATCHES", (64, 512))
    monkeypatch.setattr(neupims, "SAMPLES", 2)
    monkeypatch.setattr(neupims, "FEW", 1)
    monkeypatch.setattr(neupims, "TRACE", 20)
    monkeypatch.setattr(
        duplex, "MIXTURES", tuple(duplex.Setting(s.model, s.devices, s.nodes, (256,)) for s in duplex.MIXTURES)
    )
    monkeypatch.setattr(duplex, "DENSE", (duplex.Setting("opt-66b", 4, 1, (1024,)),))
    monkeypatch.setattr(duplex, "BATCHES", (32, 128))
    monkeypatch.setattr(duplex, "STAGES", 1.3)  # so that some of those that join are done
    for name, value in {"TEXTS": 2, "PROMPT": 12, "SCORED": 3, "BATCH": 2}.items():
        monkeypatch.setattr(pim_numerics, name, value)


def test_both_from_the_command_line(tmp_path, capsys):
    files = ["--json", str(tmp_path / "a.json"), "--plot", str(tmp_path / "a.png")]
    assert cli.main(["systems", "run", "neupims", "duplex", *files]) == 0
    reports = {r["system"]: r for r in json.loads((tmp_path / "a.json").read_text())["reports"]}
    assert "partly seen" in capsys.readouterr().out
    for report in reports.values():
        assert report["problems"] == []
        for _, published, ours, ratio, near in report["tables"][0]["rows"]:
            assert ratio == pytest.approx(ours / published) and near == ("yes" if abs(ratio - 1) <= 0.25 else "no")
        near = {row[0]: row[-1] for row in report["tables"][0]["rows"]}
        for what, _, kind, published, ours, ratio, close in report["tables"][1]["rows"]:
            assert near[what] == "no" and ratio == pytest.approx(ours / published)
            assert close == ("yes" if abs(ratio - 1) <= 0.25 else "no")
            assert kind in (claims.ALONE, claims.TOGETHER, claims.OWN)
        assert report["tables"][-1]["rows"][0][0] == "as published"
        assert len(report["tables"][-1]["rows"]) == 12
        plain, *others = report["tables"][-2]["rows"]
        assert [row[0] for row in others] == ["attention at the units", "layers at the units", "both"]
        assert all(abs(above) < 0.02 and loss - plain[1] == pytest.approx(above) for _, loss, above, _ in others)
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_the_papers_order(tmp_path):
    """Two row buffers, packing and the choice of sub-batches each help; sub-batches do at 512 and hurt at 64."""
    steps = neupims.ablation()
    for batch, (naive, buffers, packed, two, chosen) in steps.items():
        assert naive < buffers < packed and chosen == pytest.approx(max(packed, two))
        assert (two > packed) == (batch == 512)
    assert neupims._problems(steps) == [] and neupims._problems({64: [2.0, 1.0, 3.0, 1.0, 3.0]}) != []
    banks = {
        "GPU": duplex.SYSTEMS["GPU"],
        "Bank-PIM": ("bank_pim", "duplex", False),
        "Duplex": duplex.SYSTEMS["Duplex+PE+ET"],
    }
    found = duplex.grid((duplex.MIXTURES[0], *duplex.DENSE), (32,), banks)
    mixture, dense = found.values()
    assert duplex.gain(mixture, "Duplex", "Bank-PIM") > 1 > duplex.gain(dense, "Duplex", "Bank-PIM")
    assert duplex.gain(mixture, "Bank-PIM") > 1 and duplex.gain(dense, "Bank-PIM") > 1


def test_claims_are_judged():
    near, far = Claim("a", 2.0, 2.5), Claim("b", 2.0, 2.51)
    assert near.near and not far.near
    assert [claims.verdict(c) for c in ([near], [near, far], [far])] == ["seen", "partly seen", "not seen"]
    table = claims.sensitivity(
        "t", {"pim.comp_interval": ("neupims",)}, lambda d: {"x": d["neupims"]["pim.comp_interval"]}
    )
    assert table.rows == [("as published", 2, 2), ("pim.comp_interval", 1, 3)]  # whole numbers move by one at least


def test_settings_are_moved_one_at_a_time():
    claim = Claim("gain", 2.0, 1.0)
    moved = claims.nearest(claim, batch={"64": 0.9, "512": 1.6}, data={"a": 1.2, "b": 3.5})
    assert [(m.setting, m.claim.ours, m.claim.near) for m in moved] == [
        ("batch: 512", 1.6, True),
        ("data: a", 1.2, False),
    ]
    together = claims.Moved(Claim("gain", 2.0, 2.0), "batch: 512, data: b", claims.TOGETHER)
    other = claims.Moved(Claim("other", 2.0, 1.0), "batch: 512")
    rows = claims.moved_table([*moved, together]).rows
    assert rows[0] == ("gain", "batch: 512", "one of the paper's settings", 2.0, 1.6, 0.8, "yes")
    assert rows[2][1:3] == ("batch: 512, data: b", "settings moved together")
    # Only what is published and moved alone closes a figure.
    assert claims.closing([*moved, together, other]) == "gain: batch: 512; other: none"
    assert claims.closing([moved[1], together]) == "gain: none"


def test_settings_that_are_larger_than_the_memory(monkeypatch):
    """GPT-3 175B's weights over eight devices are larger than their memory, over the paper's 32 they are not."""
    assert list(neupims.too_large(("gpt3-7b",), (64,), 1).values()) == [[], []]
    monkeypatch.setattr(neupims, "MODELS", {"gpt3-175b": 8})
    key = ("gpt3-175b", "alpaca", 64)
    assert neupims.too_large(("gpt3-175b",), (64,), 1)[key] == []
    monkeypatch.setattr(neupims, "STAGES", {})
    assert neupims.too_large(("gpt3-175b",), (64,), 1)[key] == list(neupims.BASELINES)


def test_the_papers_sub_batches_are_those_of_algorithm_3():
    """The soonest of one batch and of algorithm 3's two, which the scheduler of this package may beat."""
    lengths = neupims.snapshot("sharegpt", 512, 0)
    systems = neupims.systems("gpt3-7b", *neupims.BASELINES["NeuPIMs"])
    channel = systems[0].channels(lengths, limit_capacity=False)
    (best,) = neupims._steps(systems, "sharegpt", 512, 1, balanced=True)
    assert best.seconds == min(s.step(lengths, channel=channel).seconds for s in systems)
    own = System("gpt3-7b", "neupims", tensor=4)
    assert own.step(lengths, channel=channel).seconds <= best.seconds
