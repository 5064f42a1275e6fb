"""``effops pim``: tables, files and the drawing of a small sweep; device files are checked; errors are one line."""

from __future__ import annotations

import json

import pytest
from effops import cli

for module in ("rich", "matplotlib"):
    pytest.importorskip(module, reason=f"the command's tables and drawings need {module}")

SMALL = ["--requests", "30", "--batch", "8", "--batches", "8,16", "--lengths", "64,128"]


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")


def run(*arguments: str) -> int:
    return cli.main(["pim", *arguments])


@pytest.mark.parametrize(
    "device, model, names",
    [
        ("neupims", "gpt3-7b", ["GPU-only", "NPU-only", "NPU+PIM, blocked", "NeuPIMs"]),
        ("duplex", "mixtral-8x7b", ["GPU-only", "Bank-PIM", "Duplex", "Duplex+PE+ET"]),
    ],
)
def test_systems_side_by_side(device, model, names, tmp_path, capsys):
    files = ["--json", str(tmp_path / "a.json"), "--plot", str(tmp_path / "a.png")]
    assert run("--model", model, "--device", device, "--tensor", "4", "--synthetic", "100+20", *SMALL, *files) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in names) and "tokens/s" in out and "share of the time" in out
    written = json.loads((tmp_path / "a.json").read_text())
    assert list(written["served"]) == names and written["workload"] == {"name": "100+20", "requests": 30}
    for result in written["served"].values():
        assert result["finished"] == 30 and result["tokens"] > 400
        assert result["tokens_per_second"] == pytest.approx(result["tokens"] / result["seconds"])
    assert len(written["sweep"]) == 2 * 2 * len(names)
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_a_trace_and_a_device_of_one_s_own(tmp_path, capsys):
    trace = tmp_path / "trace.csv"
    trace.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03.9799600,100,5\n2023-11-16 18:17:05,60,7\n"
    )
    device = tmp_path / "mine.json"
    device.write_text(json.dumps({"base": "neupims", "sources": {"lab": "measured"}, "timing": {"tFAW": [20, "lab"]}}))
    config = tmp_path / "config.json"
    sizes = {"hidden_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8, "vocab_size": 1000}
    config.write_text(json.dumps({"model_type": "llama", "intermediate_size": 1024, **sizes}))
    files = ["--json", str(tmp_path / "a.json")]
    assert run("--model", str(tmp_path), "--device", str(device), "--trace", str(trace), *SMALL[2:], *files) == 0
    written = json.loads((tmp_path / "a.json").read_text())
    names = [f"mine, {name}" for name in ("processor alone", "blocked", "serial", "interleaved", "neupims")]
    assert list(written["served"]) == names
    assert all(served["tokens"] == 12 and served["seconds"] > 1.02 for served in written["served"].values())
    assert "2 requests of trace" in capsys.readouterr().out


def test_validate(tmp_path, capsys):
    assert run("validate", "neupims") == 0
    out = capsys.readouterr().out
    assert "timing.tFAW = 30  npu: memory file" in out and "arXiv:2403.00579" in out
    (tmp_path / "bad.json").write_text('{"base": "npu", "sources": {}, "timing": {"tFAW": [30, "hearsay"]}}')
    assert run("validate", str(tmp_path / "bad.json")) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and "timing.tFAW: expected a source among" in captured.err
    sourced = {"base": "npu", "sources": {"lab": "measured"}, "currents": {"IDD0": [20, "lab"]}}
    (tmp_path / "bad.json").write_text(json.dumps(sourced))
    assert run("validate", str(tmp_path / "bad.json")) == 2
    assert "currents: expected an energy of 0 or more of activate" in capsys.readouterr().err


def test_a_model_that_is_not_modelled_is_one_line(tmp_path, capsys):
    sizes = {"hidden_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8, "vocab_size": 1000}
    for config, says in (
        ([1], "config.json: expected an object, got list"),
        ({**sizes, "attn_layer_period": 8}, "config.json: attn_layer_period: expected 1, attention in every layer"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert run("--model", str(tmp_path)) == 2
        captured = capsys.readouterr()
        assert says in captured.err and captured.out == "" and len(captured.err.splitlines()) == 1


@pytest.mark.parametrize(
    "arguments, says",
    [
        ([], "--model: expected a config.json, its directory or a shipped model's name, got nothing"),
        (["--model", "gpt9"], "model: expected a config.json, its directory or one of"),
        (["--model", "gpt3-7b", "--device", "npuu"], "device: expected one of"),
        (["--model", "gpt3-7b", "--synthetic", "gossip"], "workload: expected one of alpaca, sharegpt, got 'gossip'"),
        (["--model", "gpt3-7b", "--pipeline", "5"], "pipeline: expected a divisor of 32 layers, got 5"),
        (["--model", "gpt3-7b", "--trace", "/nowhere.csv"], "No such file"),
        (["--model", "gpt3-7b", "--batches", "0"], "expected positive integers separated by commas, got '0'"),
        (["--model", "gpt3-7b", "--per-second", "-1"], "expected a number above 0, got '-1'"),
        (["--model", "gpt3-7b", "--requests", "1,2"], "expected a positive integer, got '1,2'"),
        (["--model", "gpt3-7b", "--trace", "a.csv", "--per-second", "5"], "--per-second: expected none beside --trace"),
        (["--model", "gpt3-7b", "--trace", "a.csv", "--requests", "30"], "--requests: expected none beside --trace"),
        (["--model", "gpt3-7b", "--synthetic", "0+0"], "--synthetic: expected PROMPT+OUTPUT of 1 or more tokens each"),
        (["--model", "gpt3-7b", "--synthetic", "100+0"], "each, got '100+0'"),
        (["--model", "gpt3-7b", "--synthetic", "100+"], "workload: expected one of alpaca, sharegpt, got '100+'"),
    ],
)
def test_errors_are_one_line(arguments, says, capsys):
    try:
        code = run(*arguments)
    except SystemExit as end:
        code = end.code
    captured = capsys.readouterr()
    assert code in (1, 2) and captured.out == "" and says in captured.err and len(captured.err.splitlines()) == 1
