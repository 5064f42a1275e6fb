"""Laws of the simulator: never below the floor, more never hurts, the scheduler's choice is the best of its choices."""

from __future__ import annotations

import random

import pytest
from effops import _host
from effops.pim import Device, ModelShape, System, Workload
from effops.pim.simulate import bandwidth, default_scheduler, schedulers
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated import EVERY, MIXTURE, SMALL, UNITS

batches = st.lists(st.integers(1, 1500), min_size=1, max_size=96)


@settings(max_examples=15)
@given(batches, st.lists(st.integers(1, 600), max_size=3))
@pytest.mark.parametrize("device, scheduler, model", EVERY)
def test_a_step_is_never_below_its_floor(device: str, scheduler: str, model: ModelShape, decode, prefill) -> None:
    """Time is at least external bytes over bandwidth and operations over the peak; its parts add up to it."""
    system = System(model, device, scheduler=scheduler, tensor=2)
    result = system.step(decode, prefill=prefill)
    assert 0 < result.utilization["processor"] <= 1 and result.utilization["bandwidth"] <= 1
    assert 0 <= result.utilization["pim"] <= 1 + 1e-9
    assert sum(result.parts.values()) == pytest.approx(result.seconds)
    assert all(value >= 0 for value in (*result.parts.values(), *result.energy.values()))
    assert result == system.step(decode, prefill=prefill)  # deterministic


@settings(max_examples=20)
@given(batches)
def test_bytes_are_conserved(decode: list[int]) -> None:
    """Every key and value is read once: over the pins by the NPU, at the banks by the units; weights once a batch."""
    kv = 2.0 * SMALL.layers * SMALL.kv_heads * SMALL.head_dim * 2 * sum(decode)
    npu, units = (_raw(name, decode) for name in ("npu", "newton"))
    assert units["pim_bytes"] == kv and npu["pim_bytes"] == 0
    weights = SMALL.layers * 12 * SMALL.hidden**2 * 2.0
    rows = len(decode)
    activations = SMALL.layers * rows * 2.0 * (SMALL.hidden * 4 + SMALL.hidden * 2 + 2 * SMALL.hidden * 5)
    outputs = SMALL.layers * rows * 2.0 * SMALL.hidden
    assert npu["external_bytes"] == pytest.approx(weights + activations + outputs + kv)
    # Queries and probabilities in, logits and outputs out.
    vectors = 2 * SMALL.layers * SMALL.heads * 2.0 * (sum(decode) + rows * SMALL.head_dim)
    assert units["external_bytes"] == pytest.approx(weights + activations + vectors)


def _raw(device: str, decode: list[int]) -> dict:
    system = System(SMALL, device)
    return system._system.step(decode, system.channels(decode), [], 0)


@settings(max_examples=20)
@given(batches)
def test_the_scheduler_takes_the_sooner(decode: list[int]) -> None:
    times = {s: System(SMALL, "neupims", scheduler=s).step(decode).seconds for s in UNITS}
    assert times["neupims"] <= min(times["interleaved"], times["serial"]) * (1 + 1e-12)
    assert times["serial"] <= times["blocked"] * (1 + 1e-12)


def test_prompts_are_attended_to_beside_the_units() -> None:
    """A prompt's attention on the processor hides behind decoding's at the banks, unless these are blocked."""
    decode, prompt = [400] * 64, [300]
    for scheduler, hides in (("serial", True), ("blocked", False)):
        system = System(SMALL, "neupims", scheduler=scheduler)
        apart = [system.step(decode).parts["attention"], system.step([], prefill=prompt).parts["attention"]]
        both = system.step(decode, prefill=prompt).parts["attention"]
        assert both == pytest.approx(max(apart) if hides else sum(apart))


@settings(max_examples=15)
@given(st.integers(560, 1500), st.sampled_from([30, 200, 600, 2000]), st.integers(0, 1000))
def test_interleaved_is_no_slower_than_blocked_where_arithmetic_binds(batch: int, longest: int, seed: int) -> None:
    """277 rows take the arrays as long as their weights the memory; halves of more cost nothing."""
    draw = random.Random(seed)
    decode = [draw.randint(1, longest) for _ in range(batch)]
    both, blocked = (System("gpt3-7b", "neupims", scheduler=s, tensor=4) for s in ("interleaved", "blocked"))
    channel = both.channels(decode)
    assert both.step(decode, channel=channel).seconds <= blocked.step(decode, channel=channel).seconds


def test_sub_batches_pay_where_gemm_is_bound_by_arithmetic_and_cost_where_by_bytes() -> None:
    """GPT-3 7B over four devices: two sub-batches read the weights twice, which large batches hide."""
    for batch, pays in ((64, False), (1024, True)):
        decode = [300] * batch
        times = {s: System("gpt3-7b", "neupims", scheduler=s, tensor=4).step(decode).seconds for s in UNITS}
        assert (times["interleaved"] < times["blocked"]) == pays
        assert (times["interleaved"] < times["serial"]) == pays


@settings(max_examples=10)
@given(batches)
@pytest.mark.parametrize("name", ["npu", "newton", "neupims", "h100"])
def test_more_channels_are_never_slower(name: str, decode: list[int]) -> None:
    device = Device.load(name)
    more = device.replace("memory.channels", 2 * device["memory.channels"])
    assert System(SMALL, more).step(decode).seconds <= System(SMALL, device).step(decode).seconds * (1 + 1e-9)


def test_more_channels_are_not_slower_where_requests_of_two_lengths_pair_badly() -> None:
    """Long requests in front of short ones: with 256 channels algorithm 3 gives both halves a long one each."""
    decode = [4096] * 128 + [64] * 128
    seconds: dict[str, list[float]] = {}
    for scheduler in UNITS:
        for channels in (128, 256):
            device = Device.load("neupims").replace("memory.channels", channels)
            step = System("gpt3-7b", device, scheduler=scheduler, tensor=4).step(decode)
            seconds.setdefault(scheduler, []).append(step.seconds)
    fewer, more = seconds["neupims"]
    assert more <= fewer * (1 + 1e-9)
    assert seconds["interleaved"][1] > seconds["interleaved"][0]  # list schedules have anomalies
    assert all(
        n <= min(i, s) for n, i, s in zip(*(seconds[k] for k in ("neupims", "interleaved", "serial")), strict=True)
    )


@settings(max_examples=10)
@given(batches)
def test_a_faster_near_processor_is_never_slower(decode: list[int]) -> None:
    device = Device.load("duplex")
    faster = device.replace("pim.peak_tflops", 2 * device["pim.peak_tflops"])
    for scheduler in ("duplex", "co_processing"):
        slow, fast = (System(MIXTURE, d, scheduler=scheduler).step(decode).seconds for d in (device, faster))
        assert fast <= slow * (1 + 1e-9)
    one, both = (System(MIXTURE, device, scheduler=s).step(decode).seconds for s in ("duplex", "co_processing"))
    gpu = System(MIXTURE, device, scheduler="processor").step(decode).seconds
    assert both <= one * (1 + 1e-9) and both <= gpu * (1 + 1e-9)


@pytest.mark.parametrize("device, scheduler, model", EVERY)
def test_no_work_costs_nothing(device: str, scheduler: str, model: ModelShape) -> None:
    result = System(model, device, scheduler=scheduler).step([])
    assert result.seconds == 0 and sum(result.energy.values()) == 0 and result.tokens == 0


@pytest.mark.parametrize("length", [1, 40, 300, 511, 700, 2048])
@pytest.mark.parametrize("name", ["newton", "neupims"])
def test_fast_mode_is_within_two_percent_of_every_command(name: str, length: int) -> None:
    """A channel with several requests' attention."""
    system = System("gpt3-7b", name, tensor=4)
    requests = [length, 300, length, 77]
    steps = [s for n in requests for s in system._system.attention_steps(n)]
    exact = _host.pim.simulate_channel(system.device.numbers, [], steps, 0, True, False)["gemv_cycles"]
    fast = sum(system._system.attention_cycles(n) for n in requests)
    assert fast == pytest.approx(exact, rel=0.02)


@pytest.mark.parametrize("name", ["npu", "neupims", "h100", "duplex"])
def test_sustained_rates_are_those_of_long_streams(name: str) -> None:
    system = System(SMALL, name)
    d, rates = system.device, system.rates()
    accesses = 200_000
    cycles = _host.pim.simulate_channel(d.numbers, [(accesses, False)], [], 0, True, False)["transfer_cycles"]
    seconds = cycles / d["memory.clock_ghz"]
    moved = accesses * d["memory.access_bytes"] * d["memory.channels"]
    assert rates["read_gb_per_s"] == pytest.approx(moved / seconds, rel=0.01)
    assert 0.85 * bandwidth(d) < rates["read_gb_per_s"] < bandwidth(d)


@pytest.mark.parametrize("data, batch", [("sharegpt", 96), ("sharegpt", 256), ("alpaca", 512)])
def test_sampled_steps_are_within_two_percent_of_every_command(data: str, batch: int) -> None:
    """All channels of a batch in full swing, each simulated command by command; the slowest decides."""
    system = System("gpt3-7b", "neupims", scheduler="serial", tensor=4)
    work = Workload.named(data, batch, seed=5).warm(batch)
    lengths = [p + max(1, g) for p, g in zip(work.prompt, work.generated, strict=True)]
    channel = system.channels(lengths)
    cycles = []
    for c in range(32):
        steps = [
            s for n, at in zip(lengths, channel, strict=True) if at == c for s in system._system.attention_steps(n)
        ]
        cycles.append(_host.pim.simulate_channel(system.device.numbers, [], steps, 0, True, False)["gemv_cycles"])
    layers = system.model.layers
    assert system.step(lengths).parts["attention"] * 1e9 == pytest.approx(layers * max(cycles), rel=0.02)


@pytest.mark.parametrize("batch", [256, 512])
@pytest.mark.parametrize("length", [60, 300, 900])
def test_units_beside_a_stream_are_within_two_percent_of_every_command(batch: int, length: int) -> None:
    """A half batch's attention beside a layer's weights in one channel: what `interleaved` takes for granted."""
    system = System("gpt3-7b", "neupims", tensor=4)
    requests = [length] * (batch // 64)
    steps = [s for n in requests for s in system._system.attention_steps(n)]
    d, rates = system.device, system.rates()
    units = sum(system._system.attention_cycles(n) for n in requests)
    accesses = int(24 * 4096 * 4096 / 4 / 32 / 64)
    stream = accesses * d["memory.access_bytes"] * d["memory.channels"] / rates["read_gb_per_s"]
    report = _host.pim.simulate_channel(d.numbers, [(accesses, False)], steps, 0, True, False)
    expected = system._system.overlapped(stream, units)
    assert min(expected) > 1.03 * min(stream, units)  # each slows the other
    assert max(report["transfer_cycles"], report["gemv_cycles"]) == pytest.approx(max(expected), rel=0.02)
    assert report["transfer_cycles"] == pytest.approx(expected[0], rel=0.04)
    assert report["gemv_cycles"] == pytest.approx(expected[1], rel=0.04)


MODELS = [
    ("neupims", "serial", SMALL, {}),
    ("neupims", "interleaved", SMALL, {}),
    ("h100", "processor", MIXTURE, {}),
    ("duplex", "co_processing", MIXTURE, {"split_experts": True}),
]


@pytest.mark.parametrize("device, scheduler, model, options", MODELS)
def test_a_batch_on_twice_the_groups_takes_what_half_takes_on_one(device, scheduler, model, options) -> None:
    """Data groups work side by side, parts of a pipeline one after the other; operations do not depend on the split."""
    decode = [100 + 37 * (i % 9) for i in range(36)]
    twice = [n for n in decode for _ in range(2)]
    one = System(model, device, scheduler=scheduler, **options)
    base, double = one.step(decode), one.step(twice)
    for split in ({"data": 2}, {"pipeline": 2}):
        other = System(model, device, scheduler=scheduler, **split, **options)
        step = other.step(twice)
        flops = [s._system.step(twice, s.channels(twice), [], 0) for s in (one, other)]
        total = [f["processor_flops"] + f["pim_flops"] for f in flops]
        assert total[0] == pytest.approx(total[1])
        if not model.experts:
            assert step.seconds == pytest.approx(base.seconds, rel=1e-6)
            assert step.tokens_per_second == pytest.approx(2 * base.tokens_per_second, rel=1e-6)
        else:
            assert base.seconds * 0.5 < step.seconds < double.seconds * 1.05


def test_one_sequence_on_many_groups_does_all_of_its_work() -> None:
    raw = [
        System(MIXTURE, "h100", data=data, split_experts=split)._system.step([100], [0], [], 0)["processor_flops"]
        for data in (1, 2, 4, 16)
        for split in (False, True)
    ]
    assert raw == pytest.approx([raw[0]] * len(raw))


def test_heads_divide_over_devices_or_are_refused() -> None:
    """Fewer KV heads than devices: each lies on all that need it, no query is computed twice."""
    flops = [
        System(MIXTURE, "h100", tensor=tensor)._system.step([400] * 8, [0] * 8, [], 0)["processor_flops"]
        for tensor in (1, 2, 4, 8, 16)
    ]
    # Beyond four devices each has a KV projection of its own, and 16 take the gate as often.
    assert flops == sorted(flops) and flops[-1] < 1.15 * flops[0]
    for tensor in (3, 6, 32):
        with pytest.raises(ValueError, match="tensor: expected a divisor of 16 heads"):
            System(MIXTURE, "h100", tensor=tensor)


@pytest.mark.parametrize("banks, share", [*((b, s) for b in (2, 4, 8) for s in (0.5, 1.0, 3.0)), (16, 3.0)])
def test_near_accesses_beside_a_stream_are_within_two_percent_of_every_command(banks: int, share: float) -> None:
    """What `co_processing` takes for granted: each side in bundles of its own, on shared power windows."""
    system = System(SMALL, Device.load("duplex").replace("pim.banks_per_access", banks))
    d, rates = system.device, system.rates()
    near, accesses = 40_000, int(80_000 * share)
    ns = near * banks * d["memory.access_bytes"] * d["memory.channels"] / rates["near_gb_per_s"]
    stream = accesses * d["memory.access_bytes"] * d["memory.channels"] / rates["read_gb_per_s"]
    report = _host.pim.simulate_channel(d.numbers, [(accesses, False)], [], near, True, False)
    expected = system._system.overlapped(stream, ns)
    for kind, at in (("transfer_cycles", expected[0]), ("near_cycles", expected[1])):
        assert report[kind] / d["memory.clock_ghz"] == pytest.approx(at, rel=0.02)


def test_co_processing_counts_what_the_sides_cost_each_other() -> None:
    """Decoding near beside a prompt's attention takes longer than it would apart."""
    model = ModelShape(layers=2, hidden=1024, heads=16, kv_heads=16, head_dim=64, intermediate=2048, vocab=0)
    both, gpu = (System(model, "duplex", scheduler=s) for s in ("co_processing", "processor"))
    decode, prompt = [1000] * 64, [2000]
    near = both.step(decode).parts["attention"]
    ahead = gpu.step([], prefill=prompt).parts["attention"]
    moved = both.step([], prefill=prompt).parts["attention"] - ahead  # keys and values to where decoding reads them
    expected = max(both._system.overlapped(ahead, near))
    assert both.step(decode, prefill=prompt).parts["attention"] - moved == pytest.approx(expected)
    assert expected > 1.01 * max(ahead, near)


def test_one_bundle_cannot_be_read_on_both_sides() -> None:
    """Bank-PIM reads all banks at once, so that the processor waits for it."""
    device = Device.load("bank_pim")
    assert default_scheduler(device) == "duplex" and schedulers(device) == ["processor", "duplex"]
    near, accesses = 4000, 8000
    both, alone, stream = (
        _host.pim.simulate_channel(device.numbers, [(a, False)], [], n, True, False)["cycles"]
        for n, a in ((near, accesses), (near, 0), (0, accesses))
    )
    assert both > 0.97 * (alone + stream)
    with pytest.raises(ValueError, match=r"'co_processing': expected two bundles of banks or more, .* got bank_pim"):
        System(MIXTURE, device, scheduler="co_processing")


@settings(max_examples=15)
@given(batches, st.sampled_from([(16, 16), (16, 4), (64, 1), (32, 2)]))
@pytest.mark.parametrize("banks", [4, 8, 16])
def test_both_processors_are_never_slower_than_either(banks: int, decode, heads) -> None:
    device = Device.load("duplex").replace("pim.banks_per_access", banks)
    model = ModelShape(
        layers=2, hidden=1024, heads=heads[0], kv_heads=heads[1], head_dim=64, intermediate=2048, vocab=0
    )
    one, both, gpu = (System(model, device, scheduler=s) for s in ("duplex", "co_processing", "processor"))
    for prefill in ([], [300]):
        times = [s.step(decode, prefill=prefill).seconds for s in (both, one, gpu)]
        moved = one.step([], prefill=prefill).seconds - gpu.step([], prefill=prefill).seconds if prefill else 0
        assert times[0] <= times[1] * (1 + 1e-9) and times[1] <= (times[2] + moved) * (1 + 1e-9)


def test_a_model_of_experts_lies_once_on_all_devices() -> None:
    """Grok-1 on 16 devices: 314 billion parameters fit, whatever the groups."""
    work = Workload.fixed(100, 10, 8)
    for tensor, data in ((8, 2), (4, 4)):
        result = System("grok-1", "duplex", tensor=tensor, data=data).serve(work, max_batch=8)
        assert result.finished == 8 and result.refused == 0


@pytest.mark.parametrize(
    "call, words",
    [
        (
            lambda: System(SMALL, "npu", scheduler="neupims"),
            "expected a device with units at the banks with 2 row buffers",
        ),
        (lambda: System(SMALL, "newton", scheduler="serial"), "2 row buffers, got newton"),
        (lambda: System(SMALL, "npu", scheduler="duplex"), "expected a near processor, got npu"),
        (lambda: System(SMALL, "npu", scheduler="magic"), "scheduler: expected one of processor, blocked"),
        (lambda: System(SMALL, "npu", tensor=0), "tensor: expected 1 or more, got 0"),
        (lambda: System(SMALL, "npu", pipeline=3), "pipeline: expected a divisor of 4 layers, got 3"),
        (lambda: System("gpt5", "npu"), "model: expected a config.json"),
        (lambda: System(SMALL, "neupims").step([10, 0]), "decode: expected keys of 1 or more, got 0"),
        (lambda: System(SMALL, "neupims").step([10], channel=[32]), "channel: expected below 32, got 32"),
        (lambda: System(SMALL, "neupims").step([10, 20], channel=[1]), "channel: expected 2 entries, got 1"),
        (lambda: System(SMALL, "npu").step([], prefill=[-1]), "prefill: expected prompts of 1 or more, got -1"),
    ],
)
def test_wrong_calls_say_what_is_wrong(call, words: str) -> None:
    with pytest.raises(ValueError) as error:
        call()
    assert words in str(error.value)
