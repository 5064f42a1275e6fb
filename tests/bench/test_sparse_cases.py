"""What the sparse cases count, and that their checks tell a list from its neighbours."""

from __future__ import annotations

import json

import pytest
import torch
from effops import cli
from effops.bench import sparse

GROUPED = sparse.Case("bfloat16", batch=2, heads=8, kv_heads=2, head_dim=64, kv_len=700)
WIDE = sparse.Case("float32", heads=4, kv_heads=4, head_dim=32, kv_len=1024, channels=12, bits=8, fraction=8)
CASES = pytest.mark.parametrize("case", [GROUPED, WIDE], ids=["grouped", "wide"])


@pytest.fixture(autouse=True)
def small_cache(monkeypatch):
    monkeypatch.setattr(sparse, "last_level_cache_bytes", lambda device="cpu": 1 << 16)


def test_a_case_counted_by_hand():
    """700 tokens of 2 sequences and 2 KV heads, 43 of them taken; a word of 8 channels a token."""
    work = sparse.work(GROUPED, ("torch", "rows"))
    assert GROUPED.selected == 43
    rows, labels, ends, lists = 2 * 2 * 2 * 43 * 64 * 2, 2 * 2 * 700 * 4, 2 * (2 * 8 * 64 * 2), 2 * 2 * 43 * 4
    assert work.bytes == rows + labels + ends + 2 * lists
    assert work.flops == 2 * 8 * (43 * 4 * 64 + 700 * 2 * 8)
    assert (work.others["attend"].bytes, work.others["select"].bytes) == (rows + ends + lists, labels + lists)
    assert work.others["dense"].bytes == 2 * 2 * 2 * 700 * 64 * 2 + ends
    page_rows, bounds, pages = 2 * 2 * 2 * 48 * 64 * 2, 2 * 2 * 2 * 44 * 64 * 2, 2 * 2 * 48 * 4  # 3 of 44 pages
    assert GROUPED.pages == 3
    assert work.others["quest"].bytes == page_rows + bounds + ends + 2 * pages
    assert work.others["quest"].flops == 2 * 8 * (48 * 4 * 64 + 44 * 4 * 64)
    assert (work.others["quest select"].bytes, work.others["quest select"].flops) == (bounds + pages, 2 * 8 * 44 * 256)
    assert work.others["torch"].bytes == rows + 2 * 2 * 700 * 8 * 2 + ends
    assert work.others["rows"].bytes == rows


def test_the_byte_bound_of_the_headline():
    """1/16 of tokens by 1/16 of channels in four bits: 14.2 times fewer bytes, the query and lists apart."""
    case = sparse.Case()
    selected = 2 * case.selected * case.head_dim * 2 + case.kv_len * case.channels // 2
    assert 14.1 < 2 * case.kv_len * case.head_dim * 2 / selected < 14.3


@CASES
def test_every_candidate_is_right_on_every_copy(case):
    work = sparse.work(case, sparse.PEERS)
    assert set(work.candidates) == {*sparse.OWN, *sparse.PEERS} and work.copies > 1
    for name, call in work.candidates.items():
        assert not isinstance(call, str)
        assert work.check(name, call(0)) <= 1, name
        call(work.copies - 1)


@CASES
def test_other_tokens_are_seen(case):
    """All of them, a list with another token at its end, a list of another head."""
    work = sparse.work(case, ())
    right, dense, lists = (work.candidates[name](0) for name in ("effops", "dense", "select"))
    assert work.check("effops", right) <= 1 < work.check("effops", dense)
    assert work.check("dense", dense) <= 1 < work.check("dense", right)
    other = lists.clone()
    other[0, 0, -sparse.WINDOW - 1] -= 1
    assert work.check("select", lists) == 0 and work.check("select", other) == torch.inf
    assert work.check("select", lists.flip(1)) == torch.inf
    pages = work.candidates["quest select"](0)
    assert work.check("quest select", pages) == 0 and work.check("quest select", pages + 1) == torch.inf
    assert work.check("quest", work.candidates["quest"](0)) <= 1 < work.check("quest", dense)
    spoilt = right.clone()
    spoilt[-1, -1, -1, -1] = torch.nan
    assert work.check("attend", right) <= 1 and work.check("attend", spoilt) == torch.inf


def test_the_rows_are_read():
    """A sum that leaves rows out is wrong."""
    work = sparse.work(WIDE, ("rows",))
    sums = work.candidates["rows"](0)
    assert work.check("rows", sums) <= 1 < work.check("rows", [x + 10 for x in sums])


def test_the_command_runs(tiny, tmp_path):
    path = tmp_path / "sparse.json"
    arguments = [
        "bench",
        "sparse",
        "--quick",
        "--dtype",
        "f32",
        "--repeat",
        "2",
        "--plot",
        str(tmp_path / "sparse.png"),
    ]
    assert cli.main([*arguments, "--json", str(path)]) == 0
    rows = json.loads(path.read_text())["rows"]
    assert [row["kv_len"] for row in rows] == [1024, 600]
    assert all(set(row["results"]) == {*sparse.OWN, *sparse.PEERS} for row in rows)
