"""Line-ups and what is shown of them: every scheduler of one's own device, points that do not fit, refusals."""

from __future__ import annotations

import json

import pytest
from effops.pim import ModelShape, Workload, report
from effops.pim.lineup import Contender, lineup

for module in ("rich", "matplotlib"):
    pytest.importorskip(module, reason=f"tables and drawings need {module}")

SMALL = ModelShape(layers=8, hidden=2048, heads=16, kv_heads=16, head_dim=128, intermediate=8192, vocab=0)


def own(tmp_path, base: str, **sections) -> list[Contender]:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"base": base, "sources": {"lab": "measured"}, **sections}))
    return lineup(path)


@pytest.mark.parametrize(
    "base, schedulers",
    [
        ("neupims", ["processor", "blocked", "serial", "interleaved", "neupims"]),
        ("newton", ["processor", "blocked"]),
        ("duplex", ["processor", "duplex", "co_processing"]),
        ("bank_pim", ["processor", "duplex"]),
        ("npu", ["processor"]),
    ],
)
def test_one_s_own_device_under_every_scheduler_that_it_can_follow(base, schedulers, tmp_path) -> None:
    contenders = own(tmp_path, base)
    assert [c.scheduler for c in contenders] == schedulers
    assert len({c.name for c in contenders}) == len(schedulers)
    assert set(report.systems(SMALL, contenders, {})) == {c.name for c in contenders}


def silent(doing: str, share: float) -> None:
    assert doing and 0 <= share <= 1


def test_points_beyond_the_memory_are_marked_and_not_drawn(tmp_path, monkeypatch) -> None:
    contenders = own(tmp_path, "neupims", memory={"rows": [2100, "lab"]})
    running = report.systems(SMALL, contenders, {})
    rows = report.swept(running, contenders, [8, 64, 512], [64, 1024], silent)
    assert {row["fits"] for row in rows} == {True, False}
    for row in rows:
        there = running[row["system"]]
        lengths = [row["length"]] * row["batch"]
        assert row["fits"] == there.fits(lengths)
        more = [r["fits"] for r in rows if (r["system"], r["length"]) == (row["system"], row["length"])
                and r["batch"] > row["batch"]]  # fmt: skip
        assert row["fits"] >= any(more)
    from matplotlib.axes import Axes

    drawn = []
    plot = Axes.plot
    monkeypatch.setattr(Axes, "plot", lambda self, x, y, **k: drawn.append(list(x)) or plot(self, x, y, **k))
    report.write_plot(tmp_path / "a.png", rows, "title")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    shown = [len([r for r in rows if r["system"] == c.name and r["length"] == 1024 and r["fits"]]) for c in contenders]
    assert [len(x) for x in drawn[: len(contenders)]] == shown and 0 < sum(shown) < 3 * len(contenders)


def test_requests_too_large_are_told_and_weights_too_large_an_error(tmp_path) -> None:
    from rich.console import Console

    contenders = own(tmp_path, "neupims", memory={"rows": [2100, "lab"]})
    running = report.systems(SMALL, contenders, {})
    work = Workload([0.0] * 3, [100, 100, 5000], [10, 10, 10], [0] * 3)
    results = report.served(running, contenders, work, silent, max_batch=4)
    console = Console(width=200, record=True, file=open(tmp_path / "out", "w"))  # noqa: SIM115
    report.print_tables(console, results, "title")
    text = console.export_text()
    units = results["mine, neupims"]
    assert units.refused == 1 and units.finished == 2 and results["mine, processor alone"].refused == 0
    said = f"mine, neupims: 1 requests are larger than the memory, which holds {units.most_tokens} tokens of a request"
    assert said in text and "mine, processor alone: 1" not in text
    small = own(tmp_path, "neupims", memory={"rows": [100, "lab"]})
    with pytest.raises(ValueError, match=r"model: expected weights of at most 0.1 GB on each of 1 mine, got 1.1 GB"):
        report.systems(SMALL, small, {})
