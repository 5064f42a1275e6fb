"""NeuPIMs (Heo et al., ASPLOS 2024, arXiv 2403.00579): an NPU and units at the banks that work at the same time.

Decoding steps of GPT-3 models on snapshots of continuous batching, timed by `effops.pim` for the paper's four systems;
no constant is fitted to the comparison. The authors prefill elsewhere, and so does this. A batch is what one pipeline
stage holds at a time: the utilisation of the authors' table 4 is not reachable with half of it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import cache

from effops.pim import Device, Result, System, Workload
from effops.systems import pim_numerics
from effops.systems.claims import (
    OWN,
    TOGETHER,
    Claim,
    Moved,
    claims_table,
    closing,
    moved_table,
    nearest,
    sensitivity,
    verdict,
)
from effops.systems.report import Curves, Report, Table
from effops.systems.runner import Run

MODELS = {"gpt3-7b": 4, "gpt3-13b": 4, "gpt3-30b": 4, "gpt3-175b": 8}  # and over how many devices a layer is split
STAGES = {"gpt3-30b": 2, "gpt3-175b": 4}  # of a pipeline, one for the others
BATCHES = (64, 128, 256, 384, 512)
DATA = ("sharegpt", "alpaca")
SAMPLES = 10  # batches, as the authors draw
FEW = 2  # where many variants are run
TRACE = 1000  # requests of the trace whose simulation is timed
SENSITIVE = ("gpt3-7b",)
# The paper's sub-batches are those of algorithm 3 alone, or none: `neupims` would also try halves by length.
SOONER = ("serial", "interleaved")
BASELINES = {
    "GPU-only": ("a100", ("processor",)),
    "NPU-only": ("npu", ("processor",)),
    "NPU+PIM": ("newton", ("blocked",)),
    "NeuPIMs": ("neupims", SOONER),
}
PUBLISHED = {"GPU-only": 3.0, "NPU-only": 2.4, "NPU+PIM": 1.6}
CONSTANTS = {
    "timing.tFAW": ("newton", "neupims"),
    "timing.tRCD": ("npu", "newton", "neupims"),
    "timing.tRFC": ("npu", "newton", "neupims"),
    "pim.comp_interval": ("newton", "neupims"),
    "pim.gwrite_cycles": ("newton", "neupims"),
    "memory.clock_ghz": ("npu", "newton", "neupims"),
    "processor.clock_ghz": ("npu", "newton", "neupims"),
    "processor.arrays": ("npu", "newton", "neupims"),
    "memory.flat_gb_per_s": ("a100",),
    "processor.peak_tflops": ("a100",),
    "processor.launch_us": ("a100",),
}
CLAIM = (
    "the NPU and units at the banks side by side: 3 times the throughput of GPU-only, 2.4 of NPU-only, 1.6 of a naive "
    "NPU+PIM on average; two row buffers give 69.7 % of it; sub-batches pay from 256 on; 1.8 times the memory's power"
)


@cache
def snapshot(data: str, batch: int, seed: int) -> list[int]:
    """Keys of each sequence when a batch in full swing is looked at."""
    work = Workload.named(data, batch, seed=seed).warm(batch, seed=seed + 1)
    return [p + max(1, g) for p, g in zip(work.prompt, work.generated, strict=True)]


Systems = Sequence[System]  # one under several schedulers, of which every step takes the soonest


def systems(model: str, device: Device | str, schedulers: Sequence[str]) -> Systems:
    return [System(model, device, scheduler=s, tensor=MODELS[model]) for s in schedulers]


def throughput(systems: Systems, data: str, batch: int, samples: int, *, balanced: bool) -> float:
    """Tokens a second over ``samples`` batches."""
    steps = list(_steps(systems, data, batch, samples, balanced=balanced))
    return samples * batch / sum(step.seconds for step in steps)


def _steps(systems: Systems, data: str, batch: int, samples: int, *, balanced: bool) -> Iterator[Result]:
    for seed in range(samples):
        lengths = snapshot(data, batch, seed)
        # The authors' traces are packed beforehand, without regard to room.
        channel = systems[0].channels(lengths, balanced=balanced, limit_capacity=False)
        yield min((s.step(lengths, channel=channel) for s in systems), key=lambda step: step.seconds)


def gains(
    devices: Mapping[str, Device | str],
    models: Sequence[str],
    batches: Sequence[int],
    samples: int,
    run: Run | None = None,
) -> dict[tuple[str, str, int], dict[str, float]]:
    """NeuPIMs' throughput over each baseline's, by model, data and batch."""
    found: dict[tuple[str, str, int], dict[str, float]] = {}
    for model in models:
        running = {name: systems(model, devices.get(d, d), schedulers) for name, (d, schedulers) in BASELINES.items()}
        for data in DATA:
            for batch in batches:
                if run is not None:
                    run.progress(
                        f"{model}, {data}, {batch} sequences", len(found), len(models) * len(DATA) * len(batches)
                    )
                rate = {
                    name: throughput(s, data, batch, samples, balanced=name != "NPU+PIM") for name, s in running.items()
                }
                found[model, data, batch] = {name: rate["NeuPIMs"] / rate[name] for name in PUBLISHED}
    return found


def mean_gains(found: Mapping[tuple[str, str, int], Mapping[str, float]]) -> dict[str, float]:
    return {name: statistics.fmean(row[name] for row in found.values()) for name in PUBLISHED}


def too_large(models: Sequence[str], batches: Sequence[int], samples: int) -> dict[tuple[str, str, int], list[str]]:
    """The systems whose memory, of all stages of the pipeline, does not hold the weights with the keys and values of
    a batch in every stage."""

    def fits(system: System, stages: int, lengths: Sequence[int], balanced: bool) -> bool:
        running = [n for n in lengths for _ in range(stages)]  # every part of the pipeline's batch is a batch
        return system.fits(running, channel=system.channels(running, balanced=balanced))

    found: dict[tuple[str, str, int], list[str]] = {}
    for model in models:
        stages = STAGES.get(model, 1)
        running = {
            name: System(model, device, scheduler=schedulers[0], tensor=MODELS[model], pipeline=stages)
            for name, (device, schedulers) in BASELINES.items()
        }
        for data in DATA:
            for batch in batches:
                lengths = [snapshot(data, batch, seed) for seed in range(samples)]
                found[model, data, batch] = [
                    name
                    for name, system in running.items()
                    if not all(fits(system, stages, n, name != "NPU+PIM") for n in lengths)
                ]
    return found


def run(run: Run) -> Report:
    found = gains({}, tuple(MODELS), BATCHES, SAMPLES, run)
    large = too_large(tuple(MODELS), BATCHES, SAMPLES)
    mean = mean_gains(found)
    steps = ablation()
    power, energy = _power()
    run.progress("sensitivity")
    sensitive = sensitivity(
        f"mean gains of {', '.join(SENSITIVE)} with one constant moved",
        CONSTANTS,
        lambda devices: mean_gains(gains(devices, SENSITIVE, BATCHES, FEW)),
    )
    requests = Device.load("a100").replace("processor.kernels_per_request", 3)
    apart = mean_gains(gains({"a100": requests}, tuple(MODELS), BATCHES, FEW, run))["GPU-only"]
    claims = [Claim(f"throughput over {name}, mean of all", PUBLISHED[name], mean[name]) for name in PUBLISHED]
    claims += [
        Claim("two row buffers, mean gain", 1.697, statistics.fmean(row[1] / row[0] for row in steps.values())),
        Claim("power of the memory over NPU-only", 1.8, power),
        Claim("energy of the memory over NPU-only", 0.75, energy),
    ]
    moved = _moved(found, steps, claims, apart)
    tables = [
        claims_table(claims), moved_table(moved), _means_table(_means(found)), _gain_table(found, large),
        _ablation_table(steps), _utilisation(), _trace_table(run), pim_numerics.table(run, "neupims"), sensitive,
    ]  # fmt: skip
    seen = (
        f"{sum(c.near for c in claims)} of {len(claims)} figures within 25 % as they are; of the others, one published "
        f"setting moved alone closes: {closing(moved)}. NeuPIMs is ahead of "
        "NPU+PIM and that of NPU-only, packing always helps, sub-batches pay for large batches alone; a GPU that reads "
        "the batch in one kernel is ahead of NPU-only, and of NeuPIMs where attention is short. "
        f"{sum(not names for names in large.values())} of {len(large)} settings fit in every system's memory."
    )
    unseen = (
        "why the authors' naive NPU+PIM rests for more than half of its time (their table 4), which the text does not "
        "say. Their A100 was measured, ours is a roofline whose launch cost has no verified source"
    )
    return Report(
        "neupims", "GPT-3 7B to 175B (sizes only)", CLAIM, tables, _curves(found), verdict(claims), seen, unseen,
        _problems(steps),
    )  # fmt: skip


def _means(found: Mapping[tuple[str, str, int], Mapping[str, float]]) -> dict[tuple[str, int], dict[str, float]]:
    """Of the models, by data and batch."""
    return {
        (data, batch): {name: statistics.fmean(found[m, data, batch][name] for m in MODELS) for name in PUBLISHED}
        for data in DATA
        for batch in BATCHES
    }


def _moved(
    found: Mapping[tuple[str, str, int], Mapping[str, float]],
    steps: Mapping[int, Sequence[float]],
    claims: Sequence[Claim],
    apart: float,
) -> list[Moved]:
    """Claims that are not near, with the batch size, the data set or the model that is nearest to the paper's figure
    alone; then what moves more than one setting, or one that the paper does not state."""

    def mean(name: str, model: str | None = None, data: str | None = None, batch: int | None = None) -> float:
        return statistics.fmean(
            row[name]
            for (m, d, b), row in found.items()
            if model in (None, m) and data in (None, d) and batch in (None, b)
        )

    moved = []
    for name, claim in zip(PUBLISHED, claims, strict=False):
        if claim.near:
            continue
        moved += nearest(
            claim,
            batch={str(b): mean(name, batch=b) for b in BATCHES},
            data={d: mean(name, data=d) for d in DATA},
            model={m: mean(name, model=m) for m in MODELS},
        )
        both = mean(name, batch=BATCHES[-1], data=DATA[0])
        setting = f"batch: {BATCHES[-1]}, data: {DATA[0]}"
        moved.append(Moved(Claim(claim.what, claim.published, both), setting, TOGETHER))
        if name == "GPU-only":
            setting = "attention request by request, three kernels each"
            moved.append(Moved(Claim(claim.what, claim.published, apart), setting, OWN))
    buffers = claims[len(PUBLISHED)]
    if not buffers.near:
        moved += nearest(buffers, batch={str(b): row[1] / row[0] for b, row in steps.items()})
    return moved


def ablation() -> dict[int, list[float]]:
    """GPT-3 7B on ShareGPT: tokens a second of naive NPU+PIM, with two row buffers, with packing, with sub-batches."""
    model = next(iter(MODELS))
    variants = [("newton", ("blocked",), False), ("neupims", ("serial",), False), ("neupims", ("serial",), True),
                ("neupims", ("interleaved",), True), ("neupims", SOONER, True)]  # fmt: skip
    running = [(systems(model, d, s), b) for d, s, b in variants]
    return {
        batch: [throughput(s, DATA[0], batch, SAMPLES, balanced=balanced) for s, balanced in running]
        for batch in BATCHES
    }


def _power() -> tuple[float, float]:
    """The memory's power and energy of NeuPIMs over NPU-only: GPT-3 7B, ShareGPT, mean of the batches."""
    power, energy = [], []
    model = next(iter(MODELS))
    for batch in BATCHES:
        watts, joules = [], []
        for name in ("NPU-only", "NeuPIMs"):
            steps = list(_steps(systems(model, *BASELINES[name]), DATA[0], batch, SAMPLES, balanced=True))
            used = sum(s.energy[part] for s in steps for part in ("memory", "pim", "background"))
            watts.append(used / sum(s.seconds for s in steps))
            joules.append(used)
        power.append(watts[1] / watts[0])
        energy.append(joules[1] / joules[0])
    return statistics.fmean(power), statistics.fmean(energy)


def _problems(steps: Mapping[int, Sequence[float]]) -> list[str]:
    problems = []
    for batch, (naive, buffers, packed, two, chosen) in steps.items():
        if not naive <= buffers <= packed * 1.0001 or chosen < max(packed, two) * 0.9999:
            problems.append(f"batch {batch}: a technique made it slower, or the choice was not the best")
    return problems


Rows = list[tuple[str | float | None, ...]]


def _means_table(means: Mapping[tuple[str, int], Mapping[str, float]]) -> Table:
    rows: Rows = [(data, batch, *row.values()) for (data, batch), row in means.items()]
    return Table("NeuPIMs' throughput, mean of the models, over", ("data", "batch", *PUBLISHED), rows)


def _gain_table(
    found: Mapping[tuple[str, str, int], Mapping[str, float]], large: Mapping[tuple[str, str, int], Sequence[str]]
) -> Table:
    rows: Rows = [(*key, *row.values(), ", ".join(large[key]) or "none") for key, row in found.items()]
    columns = ("model", "data", "batch", *PUBLISHED, "larger than the memory of")
    fit = {key: row for key, row in found.items() if not large[key]}
    means = [f"{mean:.2f} over {name}" for name, mean in (mean_gains(fit) if fit else {}).items()]
    note = f"mean of the {len(fit)} that fit every system's memory: {', '.join(means) or 'none'}"
    return Table("NeuPIMs' throughput over", columns, rows, note)


def _trace_table(run: Run) -> Table:
    """How long the simulation of a trace takes here."""
    model, work = next(iter(MODELS)), Workload.named(DATA[0], TRACE)
    rows: Rows = []
    for name, (device, _) in BASELINES.items():
        run.progress(f"{name}: {TRACE} requests of {DATA[0]}")
        begin = time.perf_counter()
        result = System(model, device, tensor=MODELS[model]).serve(work, max_batch=BATCHES[len(BATCHES) // 2])
        rows.append((name, time.perf_counter() - begin, result.stages, result.finished))
    return Table(
        f"seconds in which {TRACE} requests of {DATA[0]} with {model} are simulated", ("system", "seconds", "stages",
        "requests done"), rows, "one run each, prefill included",
    )  # fmt: skip


def _ablation_table(steps: Mapping[int, Sequence[float]]) -> Table:
    columns = ("batch", "NPU+PIM", "+ two row buffers", "+ packing", "sub-batches always", "the sooner")
    return Table(
        f"{next(iter(MODELS))} on {DATA[0]}: tokens a second", columns, [(b, *row) for b, row in steps.items()]
    )


def _utilisation() -> Table:
    """The authors' table 4: GPT-3 30B, 256 sequences of ShareGPT."""
    model = "gpt3-30b" if "gpt3-30b" in MODELS else tuple(MODELS)[-1]
    rows: Rows = []
    for name, (device, schedulers) in list(BASELINES.items())[1:]:
        running = systems(model, device, schedulers)
        steps = list(_steps(running, DATA[0], BATCHES[len(BATCHES) // 2], SAMPLES, balanced=name != "NPU+PIM"))
        rows.append(
            (
                name,
                *(
                    100 * statistics.fmean(s.utilization[key] for s in steps)
                    for key in ("processor", "pim", "bandwidth")
                ),
            )
        )
    return Table(
        f"utilisation in %: {model}, {BATCHES[len(BATCHES) // 2]} sequences of {DATA[0]}",
        ("system", "NPU", "units", "bandwidth"), rows,
        "paper: NPU 28.0 with NPU+PIM, 64.9 with NeuPIMs; units 26.4; ours counts the units' product cycles alone",
    )  # fmt: skip


def _curves(found: Mapping[tuple[str, str, int], Mapping[str, float]]) -> list[Curves]:
    return [
        Curves(
            f"{data}: NeuPIMs over {name}", "sequences", "times the throughput",
            {m: [(b, found[m, data, b][name]) for b in BATCHES] for m in MODELS}, {"paper, mean": PUBLISHED[name]},
        )
        for name in ("NPU-only", "NPU+PIM") for data in DATA
    ]  # fmt: skip
