"""The command-level simulator: a trace obeys the device's constraints, moves what was asked and is never too fast."""

from __future__ import annotations

import pytest
from checker import Checker
from effops import _host
from effops.pim import Device
from hypothesis import given, settings
from hypothesis import strategies as st

DEVICES = {name: Device.load(name) for name in ("npu", "newton", "neupims", "h100", "duplex", "bank_pim")}


def simulate(device: Device, transfers=(), gemv=(), near=0, refresh=True, trace=True):
    return _host.pim.simulate_channel(device.numbers, list(transfers), list(gemv), near, refresh, trace)


@st.composite
def variants(draw) -> Device:
    """A shipped device, perhaps with other timings."""
    device = DEVICES[draw(st.sampled_from(sorted(DEVICES)))]
    for name in draw(
        st.lists(
            st.sampled_from(["tRCD", "tRP", "tRRD_S", "tRRD_L", "tFAW", "tWR", "tRTP", "tCCD_L", "tCL"]),
            max_size=3,
            unique=True,
        )
    ):
        device = device.replace(f"timing.{name}", draw(st.integers(24, 60) if name == "tFAW" else st.integers(1, 24)))
    if device.get("pim.kind") == "banks":
        device = device.replace("pim.banks_per_activation", draw(st.sampled_from([1, 2, 4])))
    if device.get("pim.kind") == "near":
        device = device.replace("pim.banks_per_access", draw(st.sampled_from([2, 8, 16, 32])))
        device = device.replace("pim.activations_per_access", draw(st.sampled_from([1, 3, 4, 8])))
    t = {name: c.value for name, c in device.constants["timing"].items()}
    if t["tRAS"] < t["tRCD"]:
        device = device.replace("timing.tRAS", t["tRCD"])
    return device.replace("timing.tREFI", draw(st.sampled_from([t["tREFI"], 2400])))


@st.composite
def work(draw, device: Device) -> dict:
    kind = device.get("pim.kind")
    sizes = st.integers(0, 300)
    transfers = draw(st.lists(st.tuples(sizes, st.booleans()), max_size=6))
    steps = st.one_of(
        st.tuples(st.just(True), st.just(0), st.just(0)),
        st.tuples(st.just(False), st.integers(0, 5), st.integers(1, 32)),
    )
    gemv = draw(st.lists(steps, max_size=24)) if kind == "banks" else []
    near = draw(st.integers(0, 600)) if kind == "near" else 0
    return {"transfers": transfers, "gemv": gemv, "near": near}


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_trace_obeys_every_constraint(data) -> None:
    device = data.draw(variants())
    asked = data.draw(work(device))
    report = simulate(device, **asked)
    assert Checker(device).check(report["trace"]) == []
    counts = report["counts"]
    assert counts["read"] == sum(n for n, write in asked["transfers"] if not write)
    assert counts["write"] == sum(n for n, write in asked["transfers"] if write)
    assert counts["near_read"] == asked["near"]
    assert counts["gwrite"] == sum(vector for vector, _, _ in asked["gemv"])
    assert counts["comp"] == sum(sums * comps for _, sums, comps in asked["gemv"])
    assert counts["result"] == sum(sums for vector, sums, _ in asked["gemv"] if not vector) * result_bursts(device)
    assert counts["activate"] == counts["precharge"]
    assert counts["near_activate"] == counts["near_precharge"]


def result_bursts(device: Device) -> int:
    if device.get("pim.kind") != "banks":
        return 0
    banks = device["memory.ranks"] * device["memory.bank_groups"] * device["memory.banks_per_group"]
    return -(-device["pim.result_bytes"] * banks // device["memory.access_bytes"])


@pytest.mark.parametrize("name", sorted(DEVICES))
def test_a_long_trace_is_refreshed_in_time(name: str) -> None:
    """Reads, writes, units and near reads over several refreshes: every constraint holds, and no refresh is missed."""
    device = DEVICES[name]
    kind = device.get("pim.kind")
    asked = {"transfers": [(5000, False), (900, True), (2000, False)]}
    if kind == "banks":
        asked["gemv"] = [(True, 0, 0), (False, 4, 8), (False, 1, 32), (False, 1, 5)] * 30
    if kind == "near":
        asked["near"] = 4000
    report = simulate(device, **asked)
    assert Checker(device).check(report["trace"]) == []
    due = device["memory.ranks"] * (report["cycles"] // device["timing.tREFI"])
    assert due >= 4 and 0 <= report["counts"]["refresh"] - due + device["memory.ranks"] <= 2 * device["memory.ranks"]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_never_below_what_the_buses_and_units_take(data) -> None:
    device = data.draw(variants())
    asked = data.draw(work(device))
    report = simulate(device, **asked, trace=False)
    accesses = sum(n for n, _ in asked["transfers"])
    assert report["transfer_cycles"] >= accesses * device["timing.burst"]
    assert report["near_cycles"] >= asked["near"] * device["timing.tCCD_L"]
    assert report["cycles"] >= report["data_bus_cycles"]
    assert report["gemv_cycles"] >= report["comp_cycles"]
    assert (report["cycles"] == 0) == (
        accesses == 0 and asked["near"] == 0 and not any(v or s for v, s, _ in asked["gemv"])
    )


@pytest.mark.parametrize("name", sorted(DEVICES))
def test_no_work_costs_nothing(name: str) -> None:
    report = simulate(DEVICES[name])
    assert report["cycles"] == 0 and report["pj"] == 0 and report["trace"] == []


def test_the_same_work_takes_the_same_time() -> None:
    asked = {"transfers": [(300, False), (40, True)], "gemv": [(True, 0, 0), (False, 4, 8)] * 20}
    assert simulate(DEVICES["neupims"], **asked) == simulate(DEVICES["neupims"], **asked)


def test_one_row_of_units_by_hand() -> None:
    """Eight grouped activations, four a rank and a power window apart, then products, a result, precharge."""
    device = DEVICES["neupims"]
    report = simulate(device, gemv=[(False, 1, 32)], refresh=False)
    commands = [(cycle, op) for cycle, op, *_ in report["trace"]]
    assert commands[0] == (0, "header")
    grouped = [cycle for cycle, op in commands if op == "group_activate"]
    assert grouped == [1, 2, 31, 32, 61, 62, 91, 92]
    comp = 92 + 14
    assert commands[9:] == [(comp, "comp"), (comp + 64, "result"), (comp + 64 + 6, "pim_precharge")]


def test_two_row_buffers_let_reads_go_on() -> None:
    """With one row buffer reads wait for the units, with two they share the channel."""
    asked = {"transfers": [(2000, False)], "gemv": [(False, 4, 8)] * 20}
    alone = {key: simulate(DEVICES["neupims"], **{key: value}, trace=False)["cycles"] for key, value in asked.items()}
    both = simulate(DEVICES["neupims"], **asked, trace=False)["cycles"]
    single = simulate(DEVICES["newton"], **asked, trace=False)["cycles"]
    assert max(alone.values()) <= both < 0.75 * sum(alone.values())
    assert single > 0.97 * sum(alone.values())


def test_the_checker_sees_a_broken_trace() -> None:
    """Every constraint can fail: shorten a wait by a cycle at every command of a dense trace."""
    seen = set()
    for name, asked in {
        "neupims": {
            "transfers": [(200, False), (40, True), (40, False)],
            "gemv": [(True, 0, 0), (False, 2, 8), (False, 1, 1)] * 3,
        },
        "duplex": {"transfers": [(100, False)], "near": 200},
    }.items():
        device = DEVICES[name]
        trace = simulate(device, **asked)["trace"]
        assert Checker(device).check(trace) == []
        for i, (cycle, *rest) in enumerate(trace):
            for early in (1, 12):
                wrong = [*trace[:i], (cycle - early, *rest), *trace[i + 1 :]]
                seen |= {problem.partition(":")[0] for problem in Checker(device).check(wrong)}
    assert {"tRCD", "tFAW", "tRRD_S", "tCCD_L", "tRTP", "tWR", "data bus", "two commands in a cycle"} <= seen
    assert {"tRCD of the units' rows", "result before its sum", "tWTR_S", "tCCD_L of the near path"} <= seen


@pytest.mark.parametrize(
    "broken, cycles",
    [
        ("tRAS", [(0, "activate"), (33, "precharge")]),
        ("tRP", [(0, "activate"), (40, "precharge"), (53, "activate")]),
        ("tRC", [(0, "activate"), (30, "precharge"), (47, "activate")]),
        ("tRFC", [(0, "refresh"), (259, "activate")]),
        ("column of a row that is not open", [(0, "activate"), (40, "precharge"), (41, "read")]),
        ("activates an open row", [(0, "activate"), (90, "activate")]),
    ],
)
def test_the_checker_knows(broken: str, cycles: list[tuple[int, str]]) -> None:
    problems = Checker(DEVICES["npu"]).check([(cycle, op, 0, 0, 5, 1) for cycle, op in cycles])
    assert broken in {problem.partition(":")[0] for problem in problems}
