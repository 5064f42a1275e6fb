"""The checker of traces: refreshes that are missing, late, early or under open rows, in traces written by hand."""

from __future__ import annotations

import pytest
from checker import Checker
from effops.pim import Device

NPU, NEUPIMS, DUPLEX, BANK_PIM = (Device.load(name) for name in ("npu", "neupims", "duplex", "bank_pim"))
EVERY, LASTS = NPU["timing.tREFI"], NPU["timing.tRFC"]


def broken(device: Device, trace: list[tuple]) -> set[str]:
    return {problem.partition(":")[0] for problem in Checker(device).check(trace)}


def reads(until: int, refreshes: list[int]) -> list[tuple]:
    """A row of the NPU's memory read every four cycles, closed for each refresh of both ranks."""
    trace, start = [], 0
    for stop in [*refreshes, until]:
        if start + 60 < stop:
            columns = range(start + 14, stop - 40, 4)
            trace += [(start, "activate", 0, 0, 5, 1), *((c, "read", 0, 0, 5, 1) for c in columns)]
            trace += [(stop - 20, "precharge", 0, 0, 5, 1)]
        if stop != until:
            trace += [(stop, "refresh", 0, 0, -1, 1), (stop + 1, "refresh", 1, 0, -1, 1)]
            start = stop + 1 + LASTS
    return trace


def test_refreshes_in_time() -> None:
    due = [EVERY * i for i in range(1, 7)]
    assert broken(NPU, reads(24_000, due)) == set()
    assert broken(NPU, reads(24_000, [cycle + EVERY // 2 for cycle in due])) == set()
    assert broken(NPU, reads(24_000, [cycle - EVERY // 2 for cycle in due])) == set()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_refresh_is_missed(rank: int) -> None:
    """None at all, none of one rank, none at the end."""
    due = [EVERY * i for i in range(1, 7)]
    assert broken(NPU, reads(24_000, [])) == {"tREFI, late"}
    other = [c for c in reads(24_000, due) if c[1:3] != ("refresh", rank)]
    assert broken(NPU, other) == {"tREFI, late"}
    assert broken(NPU, reads(24_000, due[:4])) == {"tREFI, late"}
    assert broken(NPU, reads(2 * EVERY, [])) == set()  # one may still come


def test_a_first_refresh_that_is_seven_intervals_late_though_all_are_made_up_for() -> None:
    late = [8 * EVERY + i * (LASTS + 1) for i in range(8)]
    assert broken(NPU, reads(9 * EVERY, late)) == {"tREFI, late"}


def test_refreshes_ahead_of_time() -> None:
    assert broken(NPU, reads(3000, [100, 1000])) == {"tREFI, early"}


@pytest.mark.parametrize("device, banks", [(BANK_PIM, 32), (DUPLEX, 8)])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_near_row_is_open_in_every_rank_that_it_spans(device: Device, banks: int, rank: int) -> None:
    spans = rank * 16 < banks
    opens = (10, "near_activate", 0, 0, 5, banks)
    closes = (200, "near_precharge", 0, 0, 5, banks)
    assert broken(device, [opens, (150, "refresh", rank, 0, -1, 1), closes]) == (
        {"refresh with an open row", "tRFC"} if spans else set()
    )
    for cycle in (218, 219):  # tRP
        found = broken(device, [opens, closes, (cycle, "refresh", rank, 0, -1, 1)])
        assert found == ({"refresh with an open row"} if spans and cycle == 218 else set())


@pytest.mark.parametrize("device, banks", [(BANK_PIM, 32), (DUPLEX, 8)])
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("cycle", [6, 455, 456])
def test_a_near_row_opens_after_the_refresh_of_every_rank_that_it_spans(device, banks, rank, cycle) -> None:
    found = broken(device, [(1, "refresh", rank, 0, -1, 1), (cycle, "near_activate", 0, 0, 5, banks)])
    assert found == ({"tRFC"} if cycle < 456 and rank * 16 < banks else set())


@pytest.mark.parametrize("rank", [0, 1])
def test_units_rest_while_any_rank_is_refreshed(rank: int) -> None:
    for cycle in (260, 261):
        trace = [(1, "refresh", rank, 0, -1, 1), (0, "header", 0, 0, 5, 1), (cycle, "pim_precharge", 0, 0, 5, 1)]
        assert ("tRFC" in broken(NEUPIMS, trace)) == (cycle == 260)
    assert broken(NPU, [(1, "refresh", rank, 0, -1, 1), (4000, "refresh", rank, 0, -1, 1)]) == set()
    assert "tRFC" in broken(NPU, [(1, "refresh", rank, 0, -1, 1), (260, "refresh", rank, 0, -1, 1)])
