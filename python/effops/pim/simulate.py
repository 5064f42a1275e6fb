"""Time and energy of a model on a device."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from effops import _host
from effops.pim.device import Device
from effops.pim.model import ModelShape
from effops.pim.workload import Workload

SCHEDULERS = {
    "processor": "everything on the GPU or NPU",
    "blocked": "decoding's attention at the banks, units and processor by turns",
    "serial": "units and processor side by side, one batch",
    "interleaved": "and two sub-batches by turns (serial with prompts, experts or one sequence)",
    "neupims": "serial or interleaved, the sooner, sub-batches also by length",
    "duplex": "processor or near processor, one at a time",
    "co_processing": "both at once, in different bundles of banks, experts and attention divided",
}
NEEDS = {"serial": 2, "interleaved": 2, "neupims": 2, "blocked": 1}


@dataclass(frozen=True)
class Result:
    """What a simulation saw. Times in seconds, energy in joules, rates of all devices together."""

    seconds: float
    tokens: int
    stages: int
    parts: Mapping[str, float]  # seconds of the critical path
    utilization: Mapping[str, float]  # of processor, pim, bandwidth, while anything runs
    energy: Mapping[str, float]  # joules of memory, pim, compute, link, background
    mixed_stages: int = 0
    finished: int = 0
    refused: int = 0
    most_tokens: int = 0  # of a request that is not refused; 0: any
    fits: bool | None = None  # whether weights and keys of a step lie in the devices' memory
    mean_batch: float = 0.0
    between_tokens: Mapping[str, float] = field(default_factory=dict)  # percentiles, seconds
    # Of requests that did not begin in the middle of their answer: from arrival, from arrival, from joining.
    first_token: Mapping[str, float] = field(default_factory=dict)
    end_to_end: Mapping[str, float] = field(default_factory=dict)
    in_batch: Mapping[str, float] = field(default_factory=dict)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def joules_per_token(self) -> float:
        return sum(self.energy.values()) / self.tokens if self.tokens else 0.0


class System:
    """A model on devices under a scheduler.

    Args:
        model: a Hugging Face configuration (`ModelShape.load`) or a `ModelShape`.
        device: a name, a file or a `Device`.
        scheduler: one of `SCHEDULERS`; the device's own by default.
        tensor, pipeline, data: devices over which layers are split, that hold consecutive layers, that share requests.
        split_experts: every expert over the ``tensor`` devices of a node, instead of experts over devices.

    Raises:
        ValueError: for a scheduler that the device cannot follow, or a model that does not divide.
    """

    def __init__(
        self,
        model: ModelShape | Mapping[str, Any] | str | Path,
        device: Device | str | Path,
        *,
        scheduler: str | None = None,
        tensor: int = 1,
        pipeline: int = 1,
        data: int = 1,
        split_experts: bool = False,
    ) -> None:
        self.model = model if isinstance(model, ModelShape) else ModelShape.load(model)
        self.device = device if isinstance(device, Device) else Device.load(device)
        self.scheduler = scheduler or default_scheduler(self.device)
        self.devices, self.parts, self.data = tensor * pipeline * data, pipeline * data, data
        for name, value in (("tensor", tensor), ("pipeline", pipeline), ("data", data)):
            if value < 1:
                raise ValueError(f"System: {name}: expected 1 or more, got {value}")
        heads, kv_heads = self.model.heads, self.model.kv_heads
        if heads % tensor or (kv_heads % tensor and tensor % kv_heads):
            fits = f"a divisor of {heads} heads, and of {kv_heads} KV heads or a multiple"
            raise ValueError(f"System: tensor: expected {fits}, got {tensor}")
        if self.model.layers % pipeline:
            raise ValueError(f"System: pipeline: expected a divisor of {self.model.layers} layers, got {pipeline}")
        _check_scheduler(self.scheduler, self.device)
        self._system = _host.pim.System(
            self.device.numbers, self.model.numbers(), tensor, pipeline, data, split_experts, self.scheduler
        )

    def step(
        self, decode: Sequence[int], *, channel: Sequence[int] | None = None, prefill: Sequence[int] = (), seed: int = 0
    ) -> Result:
        """One forward pass: ``decode`` holds each sequence's keys, ``prefill`` each new prompt's tokens.

        ``channel`` says which channel holds each sequence (units at the banks); by default the least loaded.
        """
        for name, what, values in (("decode", "keys", decode), ("prefill", "prompts", prefill)):
            if any(n < 1 for n in values):
                raise ValueError(f"step: {name}: expected {what} of 1 or more, got {min(values)}")
        if channel is None:
            channel = self.channels(decode)
        if len(channel) != len(decode):
            raise ValueError(f"step: channel: expected {len(decode)} entries, got {len(channel)}")
        channels = self.device.get("memory.channels", 1)
        for c in channel:
            if not 0 <= c < channels:
                raise ValueError(f"step: channel: expected below {channels}, got {c}")
        raw = self._system.step(list(decode), list(channel), list(prefill), seed)
        result = self._result(raw, raw["ns"], len(decode) + len(prefill), 1)
        return replace(result, fits=self.fits(decode, channel=channel, prefill=prefill))

    def channels(self, lengths: Sequence[int], *, balanced: bool = True, limit_capacity: bool = True) -> list[int]:
        """Channels for sequences: greedy by estimated time (NeuPIMs algorithm 2), or by turns. With ``limit_capacity``
        only those with room, as long as all find some."""
        if self.device.get("pim.kind") != "banks":
            return [0] * len(lengths)
        rooms = [self._system.room_bytes()] if limit_capacity and self.scheduler in NEEDS else []
        for room in (*rooms, None):
            channel = self._channels(lengths, balanced, room)
            if all(c >= 0 for c in channel):
                break
        return channel

    def _channels(self, lengths: Sequence[int], balanced: bool, room: float | None) -> list[int]:
        count = self.device["memory.channels"]
        channel = [0] * len(lengths)
        free: list[list[float]] = [[] if room is None else [room] * count for _ in range(self.data)]
        for part in range(self.parts):  # sequence i is in part i mod the parts, on devices of its own
            mine = lengths[part :: self.parts]
            taken = [self._system.kv_bytes(n) for n in mine]
            group = part % self.data
            if balanced:
                costs = [self._system.estimate_attention(n) for n in mine]
                to, _, free[group] = _host.pim.pack_min_load(costs, [0] * count, taken, free[group])
            else:
                to, free[group] = _host.pim.pack_round_robin(len(mine), count, 0, taken, free[group])
            channel[part :: self.parts] = to
        return channel

    def fits(
        self, decode: Sequence[int] = (), *, channel: Sequence[int] | None = None, prefill: Sequence[int] = ()
    ) -> bool:
        """Whether the weights, with the keys and values of these sequences, lie in the devices' memory; units at the
        banks have those of a sequence in one channel."""
        channel = self.channels(decode) if channel is None else channel
        return self._system.fits(list(decode), list(channel), list(prefill))

    def check_memory(self) -> None:
        """Raises:
        ValueError: the weights alone are larger than the devices' memory.
        """
        needed, there = (x / 1e9 for x in (self._system.weight_bytes(), self._system.capacity()))
        if needed > there:
            expected = f"weights of at most {there:.1f} GB on each of {self.devices} {self.device.name}"
            raise ValueError(f"System: model: expected {expected}, got {needed:.1f} GB")

    def serve(
        self,
        workload: Workload,
        *,
        max_batch: int,
        prefill: bool = True,
        balanced: bool = True,
        limit_capacity: bool = True,
        max_stages: int | None = None,
        seed: int = 0,
        progress: Callable[[float], None] | None = None,
    ) -> Result:
        """Continuous batching of a workload.

        Args:
            workload: the requests.
            max_batch: requests that run at once at most.
            prefill: whether prompts are prefilled here; elsewhere, if not (NeuPIMs).
            balanced: requests to channels by least load (NeuPIMs), or by turns.
            limit_capacity: whether requests wait for room in memory.
            max_stages: stop after so many stages.
            progress: called with the share of requests that are done.

        Raises:
            ValueError: the weights do not fit, with ``limit_capacity``.
        """
        if max_batch < 1:
            raise ValueError(f"serve: max_batch: expected 1 or more, got {max_batch}")
        if limit_capacity:
            self.check_memory()
        server = _host.pim.Server(
            self._system,
            [1e9 * a for a in workload.arrival_s],
            list(workload.prompt),
            list(workload.output),
            list(workload.generated),
            max_batch,
            prefill,
            balanced,
            limit_capacity,
            seed,
        )
        left = max_stages if max_stages is not None else 1 << 60
        more = True
        while more and left > 0:
            now = min(left, 64)
            more = server.advance(now)
            left -= now
            if progress is not None:
                progress(server.finished() / max(1, len(workload)))
        report = server.report()
        result = self._result(report["sum"], report["clock_ns"], report["tokens"], report["stages"])
        return replace(
            result,
            mixed_stages=report["mixed_stages"],
            finished=report["finished"],
            refused=report["refused"],
            most_tokens=int(self._system.room_bytes() // self._system.kv_bytes(1)) if limit_capacity else 0,
            mean_batch=report["batch_ns"] / report["sum"]["ns"] if report["sum"]["ns"] else 0.0,
            between_tokens=_percentiles(report["gap_ns"], report["gap_count"]),
            first_token=_percentiles(report["first_token_ns"]),
            end_to_end=_percentiles(report["end_to_end_ns"]),
            in_batch=_percentiles(report["in_batch_ns"]),
        )

    def _result(self, raw: dict[str, Any], ns: float, tokens: int, stages: int) -> Result:
        busy = raw["ns"] or 1.0
        return Result(
            seconds=ns / 1e9,
            tokens=tokens,
            stages=stages,
            parts={name: value / 1e9 for name, value in raw["part_ns"].items()},
            utilization={
                "processor": raw["processor_flops"] / (self.peak_tflops * 1e3 * busy * self.devices),
                "pim": raw["pim_busy_ns"] / busy,
                "bandwidth": raw["external_bytes"] / (bandwidth(self.device) * busy * self.devices),
            },
            energy={n: raw[f"{n}_pj"] / 1e12 for n in ("memory", "pim", "compute", "link", "background")},
        )

    @property
    def peak_tflops(self) -> float:
        """Of one device's processor."""
        d = self.device
        if d["processor.kind"] == "roofline":
            return d["processor.peak_tflops"]
        products = d["processor.arrays"] * d["processor.array_rows"] * d["processor.array_columns"]
        return 2e-3 * products * d["processor.clock_ghz"]

    def rates(self) -> dict[str, float]:
        """What the memory sustains, from command-level simulation: GB/s, and factors of overlap."""
        return self._system.rates()


def simulate(
    model: ModelShape | Mapping[str, Any] | str | Path,
    workload: Workload,
    device: Device | str | Path,
    *,
    max_batch: int = 64,
    progress: Callable[[float], None] | None = None,
    **options: Any,
) -> Result:
    """Serves ``workload`` with ``model`` on ``device``; ``options`` are those of `System` and `System.serve`."""
    of_serve = {
        k: options.pop(k) for k in ("prefill", "balanced", "limit_capacity", "max_stages", "seed") if k in options
    }
    return System(model, device, **options).serve(workload, max_batch=max_batch, progress=progress, **of_serve)


def bandwidth(device: Device) -> float:
    """GB/s of a device's pins."""
    flat = device.get("memory.flat_gb_per_s")
    if flat is not None:
        return flat
    per_cycle = device["memory.access_bytes"] / device["timing.burst"]
    return device["memory.channels"] * per_cycle * device["memory.clock_ghz"]


def default_scheduler(device: Device) -> str:
    """What the device was made for."""
    kind = device.get("pim.kind")
    if kind == "banks":
        return "neupims" if device["pim.row_buffers"] == 2 else "blocked"
    if kind == "near":
        return "co_processing" if bundles(device) > 1 else "duplex"
    return "processor"


def bundles(device: Device) -> int:
    """Groups of banks that a near processor reads at once and others meanwhile do not."""
    banks = device["memory.ranks"] * device["memory.bank_groups"] * device["memory.banks_per_group"]
    return banks // device["pim.banks_per_access"]


def schedulers(device: Device) -> list[str]:
    """What the device can follow."""
    return [name for name in SCHEDULERS if _refused(name, device) is None]


def _check_scheduler(scheduler: str, device: Device) -> None:
    if scheduler not in SCHEDULERS:
        raise ValueError(f"System: scheduler: expected one of {', '.join(SCHEDULERS)}, got {scheduler!r}")
    needed = _refused(scheduler, device)
    if needed is not None:
        raise ValueError(f"System: scheduler {scheduler!r}: expected {needed}, got {device.name}")


def _refused(scheduler: str, device: Device) -> str | None:
    """What the device would need."""
    kind = device.get("pim.kind")
    if scheduler in NEEDS and (kind != "banks" or device["pim.row_buffers"] < NEEDS[scheduler]):
        return f"a device with units at the banks with {NEEDS[scheduler]} row buffer{'s' * (NEEDS[scheduler] > 1)}"
    if scheduler in ("duplex", "co_processing") and kind != "near":
        return "a near processor"
    if scheduler == "co_processing" and bundles(device) < 2:
        return "two bundles of banks or more, of which the processor reads one while the other is read near"
    return None


def _percentiles(ns: Sequence[float], counts: Sequence[int] | None = None) -> dict[str, float]:
    if not ns:
        return {}
    pairs = sorted(zip(ns, counts if counts is not None else [1] * len(ns), strict=True))
    total, seen, out = sum(c for _, c in pairs), 0, {}
    marks = iter((("p50", 0.5), ("p90", 0.9), ("p99", 0.99)))
    name, mark = next(marks)
    for value, count in pairs:
        seen += count
        while seen >= mark * total:
            out[name] = value / 1e9
            name, mark = next(marks, ("", 2.0))
    return out
