"""NeuPIMs and Duplex from the command line to their files, on few batches; claims, sensitivity and checks."""

from __future__ import annotations

import json

import pytest
from effops import cli
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
    monkeypatch.setattr(
        duplex, "MIXTURES", tuple(duplex.Setting(s.model, s.devices, s.nodes, (256,)) for s in duplex.MIXTURES)
    )
    monkeypatch.setattr(duplex, "DENSE", (duplex.Setting("opt-66b", 4, 1, (1024,)),))
    monkeypatch.setattr(duplex, "BATCHES", (32, 128))
    monkeypatch.setattr(duplex, "STAGES", 0.1)
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
