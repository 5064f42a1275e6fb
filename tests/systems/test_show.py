"""How reports look: cells, and a drawing whose panels are those of the reports."""

from __future__ import annotations

from typing import Any

import pytest
from effops.systems.report import Curves, Report
from effops.systems.show import cell, write_plot


@pytest.mark.parametrize(
    "x, shown",
    [(None, ""), ("a", "a"), (16384, "16,384"), (0.0, "0.000"), (-0.5, "-0.500"),
     (1602.4, "1,602"), (-1602.6, "-1,603"), (2e6, "2e+06"), (1.5e-5, "1.5e-05")],
)  # fmt: skip
def test_cells(x, shown):
    assert cell(x) == shown


def report(system: str, *curves: Curves) -> Report:
    return Report(system, "a model", "a claim", (), curves, "seen", "this", "that")


def test_every_report_has_rows_of_its_own(tmp_path, monkeypatch):
    figure = pytest.importorskip("matplotlib.figure", reason="drawings need matplotlib").Figure
    drawn: list[Any] = []
    save = figure.savefig
    monkeypatch.setattr(figure, "savefig", lambda self, *a, **b: (drawn.append(self), save(self, *a, **b)))
    wide = Curves("wide", "x", "y", {"one": [(1, 3.0), (4, 2.0), (64, 1.0)], "two": [(1, 1.0), (16, 2.0)]})
    narrow = Curves("narrow", "x", "y", {"one": [(25, 3.0), (100, 2.0)]}, {"level": 1.0})
    from_zero = Curves("from zero", "x", "y", {"one": [(0, 3.0), (100, 2.0)]})
    write_plot(tmp_path / "a.png", [report("first", wide), report("none"), report("last", narrow, from_zero, wide)])
    (axes,) = (one.axes for one in drawn)
    places = [a.get_subplotspec().colspan.start + 2 * a.get_subplotspec().rowspan.start for a in axes]
    titles = [a.get_title() for a in axes]
    assert dict(zip(places, titles, strict=True)) == {
        0: "first: wide", 2: "last: narrow", 3: "last: from zero", 4: "last: wide",
    }  # fmt: skip
    assert [a.get_xscale() for a in axes] == ["log", "linear", "linear", "log"]
    assert [tick.get_text() for tick in axes[0].get_xticklabels()] == ["1", "4", "16", "64"]
    assert [len(a.lines) for a in axes] == [2, 2, 1, 2]
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
