"""What the streaming cases count, and that their checks tell a window from all tokens."""

from __future__ import annotations

import json

import pytest
import torch
from effops import cli
from effops.bench import streaming

MIXED = streaming.Case("bfloat16", batch=2, heads=8, kv_heads=4, head_dim=64, kv_len=700, full=2, sinks=4, recent=64)
ALL_STREAM = streaming.Case("float32", heads=4, kv_heads=4, head_dim=32, kv_len=300, full=0, sinks=20, recent=50)
CASES = pytest.mark.parametrize("case", [MIXED, ALL_STREAM], ids=["mixed", "streaming"])


@pytest.fixture(autouse=True)
def small_cache(monkeypatch):
    monkeypatch.setattr(streaming, "last_level_cache_bytes", lambda device="cpu": 1 << 18)


def test_a_case_counted_by_hand():
    """Two of four KV heads over 700 tokens of two sequences, two over 68."""
    work = streaming.work(MIXED, ("sdpa",))
    ends = 2 * 2 * 8 * 64 * 2
    assert work.bytes == 2 * 2 * (2 * 700 + 2 * 68) * 64 * 2 + ends
    assert work.flops == 4 * 2 * 64 * 2 * (2 * 700 + 2 * 68)
    assert (work.others["dense"].bytes, work.others["dense"].flops) == (
        2 * 2 * 4 * 700 * 64 * 2 + ends, 4 * 2 * 64 * 2 * 4 * 700,
    )  # fmt: skip


@CASES
def test_every_candidate_is_right_on_every_copy(case):
    work = streaming.work(case, streaming.PEERS)
    assert set(work.candidates) == {*streaming.OWN, *streaming.PEERS} and work.copies > 1
    for name, call in work.candidates.items():
        assert not isinstance(call, str)
        assert work.check(name, call(0)) <= 1, name
        assert torch.equal(call(work.copies - 1), call(0))


@CASES
def test_other_masks_are_seen(case):
    work = streaming.work(case, ())
    right, dense = (work.candidates[name](0) for name in ("effops", "dense"))
    assert work.check("effops", right) <= 1 < work.check("effops", dense)
    assert work.check("dense", dense) <= 1 < work.check("dense", right)
    spoilt = right.clone()
    spoilt[-1, -1, -1, -1] = torch.nan
    assert work.check("masked", spoilt) == torch.inf


def test_the_command_runs(tiny, tmp_path, capsys):
    path = tmp_path / "streaming.json"
    arguments = ["bench", "streaming", "--quick", "--dtype", "f32", "--repeat", "2"]
    assert cli.main([*arguments, "--plot", str(tmp_path / "streaming.png"), "--json", str(path)]) == 0
    rows = json.loads(path.read_text())["rows"]
    assert [row["full"] for row in rows] == [1, 0]
    assert cli.main(["bench", "streaming", "--kv-heads", "4", "--heads", "4", "--full", "5"]) != 0
    assert "--full: expected at most 4 (--kv-heads), got 5" in capsys.readouterr().err
