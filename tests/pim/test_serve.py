"""Continuous batching: tokens, order, arrivals, latencies, and what the memory holds."""

from __future__ import annotations

import statistics

import pytest
from effops import _host
from effops.pim import Device, ModelShape, System, Workload
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated import EVERY, MIXTURE, SMALL

WIDE = ModelShape(layers=8, hidden=2048, heads=16, kv_heads=16, head_dim=128, intermediate=8192, vocab=0)


def test_serving_conserves_tokens_and_order() -> None:
    work = Workload.gaussian(200, 40, 60, seed=3)
    for device, scheduler, model in EVERY:
        result = System(model, device, scheduler=scheduler).serve(work, max_batch=16)
        assert result.tokens == sum(work.output) and result.finished == 60 and result.refused == 0
        assert 1 <= result.mean_batch <= 16
        assert result.first_token["p50"] <= result.end_to_end["p50"]
        assert sum(result.parts.values()) == pytest.approx(result.seconds)


def test_requests_wait_for_memory_and_those_too_large_are_refused() -> None:
    device = Device.load("a100").replace("memory.flat_gb", 2)
    model = ModelShape(layers=8, hidden=2048, heads=16, kv_heads=16, head_dim=128, intermediate=8192, vocab=0)
    few = System(model, device).serve(Workload.fixed(4000, 100, 40), max_batch=40)
    assert few.finished == 40 and few.mean_batch < 5
    assert System(model, device).serve(Workload.fixed(10**6, 1, 3), max_batch=3).refused == 3
    free = System(model, device).serve(Workload.fixed(4000, 100, 40), max_batch=40, limit_capacity=False)
    assert free.mean_batch > few.mean_batch


def test_arrivals_are_waited_for() -> None:
    system = System(SMALL, "neupims")
    slow = system.serve(Workload.fixed(100, 10, 20).poisson(5, seed=1), max_batch=8)
    assert slow.seconds > 2 and slow.mean_batch < 1.5
    assert slow.end_to_end["p50"] < 0.1
    busy = system.serve(Workload.fixed(100, 10, 20), max_batch=8)
    assert slow.energy["background"] > 10 * busy.energy["background"]  # memories draw power while they wait


def served(system: System, work: Workload, max_batch: int, stages: int = 1 << 30, limited: bool = True) -> dict:
    server = _host.pim.Server(
        system._system, [1e9 * a for a in work.arrival_s], work.prompt, work.output, work.generated, max_batch, True,
        True, limited, 0,
    )  # fmt: skip
    server.advance(stages)
    return server.report()


def test_requests_in_the_middle_of_their_answer_have_no_latency() -> None:
    """Two that began before, then three that wait for their places: only these have a first token and a whole time."""
    work = Workload([0.0] * 5, [50] * 5, [40, 30, 20, 20, 20], [25, 10, 0, 0, 0])
    system = System(SMALL, "neupims")
    report = served(system, work, 2)
    assert report["finished"] == 5 and report["tokens"] == 15 + 20 + 60
    assert len(report["first_token_ns"]) == len(report["end_to_end_ns"]) == len(report["in_batch_ns"]) == 3
    for first, whole, inside in zip(
        report["first_token_ns"], report["end_to_end_ns"], report["in_batch_ns"], strict=True
    ):
        assert first < whole and inside < whole  # they arrived at once and waited
    # Twenty stages each, one of them with the prompt.
    mean = report["clock_ns"] / report["stages"]
    assert statistics.fmean(report["in_batch_ns"]) == pytest.approx(20 * mean, rel=0.2)
    alone = served(system, Workload.fixed(50, 20, 2), 2)
    assert alone["in_batch_ns"] == alone["end_to_end_ns"]


def test_refresh_takes_power_all_the_time() -> None:
    """By hand: ranks' refreshes an interval, whatever is read meanwhile; the energy of bytes does not depend on it."""
    device = Device.load("neupims")
    step = System(SMALL, device).step([400] * 32)
    energy, channels = device.numbers["energy"], device["memory.channels"]
    refresh = device["memory.ranks"] * energy["refresh"] / device["timing.tREFI"] * device["memory.clock_ghz"]
    watts = 1e-3 * channels * (energy["background_mw"] + energy["extra_row_buffer_mw"] + refresh)
    assert step.energy["background"] == pytest.approx(watts * step.seconds)
    assert 0.05 * watts < 1e-3 * channels * refresh < 0.2 * watts
    rarely = System(SMALL, device.replace("timing.tREFI", 4 * device["timing.tREFI"])).step([400] * 32)
    for part in ("memory", "pim"):
        assert rarely.energy[part] == pytest.approx(step.energy[part], rel=2e-3)
    waits = System(SMALL, device).serve(Workload.fixed(100, 10, 2).poisson(0.5, seed=1), max_batch=8)
    assert waits.energy["background"] == pytest.approx(watts * waits.seconds)


def with_room(model: ModelShape, channels: int, tokens: int) -> Device:
    """NeuPIMs with so many channels, each with rows for its share of the weights and so many tokens."""
    device = Device.load("neupims").replace("memory.channels", channels)
    per_token = 2 * model.layers * model.kv_heads * model.head_dim * 2
    needed = System(model, device)._system.weight_bytes() / channels + tokens * per_token
    row = device["memory.row_bytes"] * device["memory.ranks"] * 16
    return device.replace("memory.rows", int(-(-needed // row)))


def test_a_request_stays_in_a_channel_with_room() -> None:
    """Two channels with room for 1,000 tokens each: three requests of 600 do not fit at once though 1,800 tokens do."""
    device = with_room(WIDE, 2, 1000)
    units, npu = System(WIDE, device), System(WIDE, device, scheduler="processor")
    assert 1000 <= units._system.room_bytes() / (2 * WIDE.layers * WIDE.kv_heads * WIDE.head_dim * 2) < 1001
    work = Workload.fixed(500, 100, 3)
    assert units.serve(work, max_batch=3).mean_batch < 2 and npu.serve(work, max_batch=3).mean_batch > 2.9
    assert units.fits([600, 600]) and not units.fits([600, 600], channel=[1, 1]) and not units.fits([600] * 3)
    assert npu.fits([600] * 3) and not npu.fits([600] * 4) and not units.fits([600, 600], prefill=[900])
    # Where all find room they do, longest first; else as without a limit.
    assert units.channels([400, 900, 500]) == [1, 0, 1] and units.channels([900, 900, 900]) == [0, 1, 0]
    small = System(WIDE, with_room(WIDE, 2, 560))  # one of 512 keys is less work than 300 and 60
    assert small.channels([512, 300, 60, 55]) == [0, 1, 1, 1]
    assert small.channels([512, 300, 60, 55], limit_capacity=False) == [0, 1, 1, 0]
    assert small.channels([512, 300, 60, 55], balanced=False) == [0, 1, 1, 1]
    assert small.channels([512, 300, 55, 60], balanced=False, limit_capacity=False) == [0, 1, 0, 1]
    assert units.step([600, 600], channel=[0, 1]).fits and not units.step([600, 600], channel=[1, 1]).fits
    for system, most in ((units, 1000), (npu, 2000)):
        result = system.serve(Workload.fixed(most - 40, 50, 2), max_batch=2)
        assert (result.refused, result.finished) == (2, 0) and most <= result.most_tokens <= most + 1
        assert system.serve(Workload.fixed(most - 60, 50, 2), max_batch=2).finished == 2


def test_the_first_in_the_queue_is_served_though_longer_ones_behind_it_would_take_all_channels() -> None:
    """400, 800 and 900 of twice 1,100 tokens: packed from the longest on, the first of them has no channel left."""
    system = System(WIDE, with_room(WIDE, 2, 1100))
    work = Workload([0.0] * 3, [390, 790, 890], [10] * 3, [0] * 3)
    report = served(system, work, 3)
    assert report["finished"] == 3 and report["refused"] == 0
    assert report["first_token_ns"][0] == min(report["first_token_ns"]) < max(report["first_token_ns"])
    assert report["stages"] == 20  # the first two, then the last


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 900), st.integers(1, 40)), min_size=1, max_size=30), st.sampled_from([1, 2]))
def test_memory_never_holds_more_than_it_can(lengths: list[tuple[int, int]], data: int) -> None:
    """Stage after stage, by the number of requests that the stages before have left: all are served in the end."""
    system = System(SMALL, with_room(SMALL, 3, 600), data=data)
    n = len(lengths)
    work = Workload([0.0] * n, [p for p, _ in lengths], [o for _, o in lengths], [0] * n)
    most = system._system.room_bytes() // system._system.kv_bytes(1)
    small = sum(p + o <= most for p, o in lengths)
    report = served(system, work, 16)
    assert report["finished"] == small and report["refused"] == n - small
    tokens = sum(o for p, o in lengths if p + o <= most)
    assert report["tokens"] == tokens
    # What runs at once has room: token-stages are at most all stages' room.
    least = min((p for p, o in lengths if p + o <= most), default=0)
    assert report["tokens"] * least <= report["stages"] * 3 * data * most


def test_weights_that_do_not_fit_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"model: expected weights of at most 34.4 GB on each of 4 neupims, got 87.6"):
        System("gpt3-175b", "neupims", tensor=4).serve(Workload.fixed(100, 10, 4), max_batch=4)
    free = System("gpt3-175b", "neupims", tensor=4)
    assert free.serve(Workload.fixed(100, 10, 4), max_batch=4, limit_capacity=False).finished == 4
    assert not free.fits() and free.step([100]).fits is False
    with pytest.raises(ValueError, match="max_batch: expected 1 or more, got 0"):
        System(SMALL, "npu").serve(Workload.fixed(1, 1, 1), max_batch=0)


def test_a_kv_head_lies_on_every_device_that_needs_it() -> None:
    """Four KV heads over eight devices: each of these holds a whole head, not half of one."""
    four, eight = (System(MIXTURE, "h100", tensor=t)._system for t in (4, 8))
    assert four.kv_bytes(10) == eight.kv_bytes(10) == 2 * MIXTURE.layers * MIXTURE.head_dim * 2 * 10
    assert System(MIXTURE, "h100", pipeline=2)._system.kv_bytes(10) == 4 * four.kv_bytes(10) / 2
