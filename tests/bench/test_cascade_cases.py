"""What the cascade cases count, and that their checks tell both parts from one."""

from __future__ import annotations

import json

import pytest
import torch
from effops import cli
from effops.bench import cascade

GROUPED = cascade.Case("bfloat16", batch=12, heads=8, kv_heads=2, head_dim=64, shared_len=640, kv_len=40)
ONE_HEAD = cascade.Case("float32", batch=3, heads=4, kv_heads=4, head_dim=32, shared_len=128, kv_len=200)
CASES = pytest.mark.parametrize("case", [GROUPED, ONE_HEAD], ids=["grouped", "one head"])


@pytest.fixture(autouse=True)
def small_cache(monkeypatch):
    monkeypatch.setattr(cascade, "last_level_cache_bytes", lambda device="cpu": 1 << 18)


def test_a_case_counted_by_hand():
    """The prefix once, twelve sequences' own keys, queries and results."""
    work = cascade.work(GROUPED, ())
    ends = 2 * 12 * 8 * 64 * 2
    assert work.bytes == 2 * 2 * (640 + 12 * 40) * 64 * 2 + ends
    assert work.flops == 4 * 12 * 8 * 64 * (640 + 40)
    assert work.others["shared"].bytes == 2 * 2 * 640 * 64 * 2 + ends


@CASES
def test_every_candidate_is_right_on_every_copy(case):
    work = cascade.work(case, cascade.PEERS)
    assert set(work.candidates) == {*cascade.OWN, *cascade.PEERS} and work.copies > 1
    for name, call in work.candidates.items():
        assert not isinstance(call, str)
        assert work.check(name, call(0)) <= 1, name
        call(work.copies - 1)


@CASES
def test_one_part_alone_is_seen(case):
    work = cascade.work(case, ())
    whole, shared = (work.candidates[name](0) for name in ("effops", "shared"))
    assert work.check("effops", whole) <= 1 < work.check("effops", shared)
    assert work.check("shared", shared) <= 1 < work.check("shared", whole)
    assert work.check("sdpa", shared) > 1
    spoilt = whole.clone()
    spoilt[-1, -1, -1] = torch.nan
    assert work.check("paged", spoilt) == torch.inf


def test_the_command_runs(tiny, tmp_path, capsys):
    path = tmp_path / "cascade.json"
    arguments = ["bench", "cascade", "--quick", "--dtype", "f32", "--repeat", "2"]
    assert cli.main([*arguments, "--plot", str(tmp_path / "cascade.png"), "--json", str(path)]) == 0
    rows = json.loads(path.read_text())["rows"]
    assert [row["shared_len"] for row in rows] == [512, 128]
    assert cli.main(["bench", "cascade", "--shared-len", "100"]) != 0
    assert "--shared-len: expected a multiple of 64, got 100" in capsys.readouterr().err
