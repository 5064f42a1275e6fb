"""NeuPIMs (Heo et al., ASPLOS 2024, arXiv 2403.00579): an NPU and units at the banks that work at the same time.

Decoding steps of GPT-3 models on snapshots of continuous batching, timed by `effops.pim` for the paper's four systems;
no constant is fitted to the comparison. The authors prefill elsewhere, and so does this. A batch is what one pipeline
stage holds at a time: the utilisation of the authors' table 4 is not reachable with half of it.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from functools import cache

from effops.pim import Device, Result, System, Workload
from effops.systems import pim_numerics
from effops.systems.claims import Claim, claims_table, sensitivity, verdict
from effops.systems.report import Curves, Report, Table
from effops.systems.runner import Run

MODELS = {"gpt3-7b": 4, "gpt3-13b": 4, "gpt3-30b": 4, "gpt3-175b": 8}  # and over how many devices a layer is split
BATCHES = (64, 128, 256, 384, 512)
DATA = ("sharegpt", "alpaca")
SAMPLES = 10  # batches, as the authors draw
FEW = 2  # where many variants are run
SENSITIVE = ("gpt3-7b",)
BASELINES = {"GPU-only": "a100", "NPU-only": "npu", "NPU+PIM": "newton", "NeuPIMs": "neupims"}
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


def throughput(system: System, data: str, batch: int, samples: int, *, balanced: bool) -> float:
    """Tokens a second over ``samples`` batches."""
    steps = list(_steps(system, data, batch, samples, balanced=balanced))
    return samples * batch / sum(step.seconds for step in steps)


def _steps(system: System, data: str, batch: int, samples: int, *, balanced: bool) -> Iterator[Result]:
    for seed in range(samples):
        lengths = snapshot(data, batch, seed)
        yield system.step(lengths, channel=system.channels(lengths, balanced=balanced))


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
        systems = {
            name: System(model, devices.get(device, device), tensor=MODELS[model]) for name, device in BASELINES.items()
        }
        for data in DATA:
            for batch in batches:
                if run is not None:
                    run.progress(
                        f"{model}, {data}, {batch} sequences", len(found), len(models) * len(DATA) * len(batches)
                    )
                rate = {
                    name: throughput(s, data, batch, samples, balanced=name != "NPU+PIM") for name, s in systems.items()
                }
                found[model, data, batch] = {name: rate["NeuPIMs"] / rate[name] for name in PUBLISHED}
    return found


def mean_gains(found: Mapping[tuple[str, str, int], Mapping[str, float]]) -> dict[str, float]:
    return {name: statistics.fmean(row[name] for row in found.values()) for name in PUBLISHED}


def run(run: Run) -> Report:
    found = gains({}, tuple(MODELS), BATCHES, SAMPLES, run)
    mean = mean_gains(found)
    steps = ablation()
    power, energy = _power()
    run.progress("sensitivity")
    sensitive = sensitivity(
        f"mean gains of {', '.join(SENSITIVE)} with one constant moved",
        CONSTANTS,
        lambda devices: mean_gains(gains(devices, SENSITIVE, BATCHES, FEW)),
    )
    means = _means(found)
    large = (DATA[0], BATCHES[-1])
    requests = Device.load("a100").replace("processor.kernels_per_request", 3)
    apart = mean_gains(gains({"a100": requests}, tuple(MODELS), BATCHES, FEW, run))["GPU-only"]
    claims = [Claim(f"throughput over {name}, mean of all", PUBLISHED[name], mean[name]) for name in PUBLISHED]
    claims += [
        Claim("two row buffers, mean gain", 1.697, statistics.fmean(row[1] / row[0] for row in steps.values())),
        Claim("power of the memory over NPU-only", 1.8, power),
        Claim("energy of the memory over NPU-only", 0.75, energy),
    ]
    moved = [Claim("GPU-only with three kernels a request, mean of all", PUBLISHED["GPU-only"], apart)]
    for name in ("NPU-only", "NPU+PIM"):
        moved.append(Claim(f"{name} at {large[1]} sequences of {large[0]}", PUBLISHED[name], means[large][name]))
    tables = [
        claims_table(claims),
        claims_table(moved, "the same with a setting of the paper moved (three kernels: our count)"),
        _means_table(means), _gain_table(found), _ablation_table(steps), _utilisation(),
        pim_numerics.table(run, "neupims"), sensitive,
    ]  # fmt: skip
    seen = (
        f"{sum(c.near for c in claims)} of {len(claims)} figures within 25 % as they are; "
        f"{sum(c.near for c in moved)} of {len(moved)} gains with a setting of the paper moved. NeuPIMs is ahead of "
        "NPU+PIM and that of NPU-only, packing always helps, sub-batches pay for large batches alone; a GPU that reads "
        "the batch in one kernel is ahead of NPU-only, and of NeuPIMs where attention is short."
    )
    unseen = (
        "the gain of two row buffers over NPU+PIM: no published parameter gives it; the authors' naive system rests "
        "for more than half of its time (their table 4) for reasons that the text does not give. Their A100 was "
        "measured, ours is a roofline"
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


def ablation() -> dict[int, list[float]]:
    """GPT-3 7B on ShareGPT: tokens a second of naive NPU+PIM, with two row buffers, with packing, with sub-batches."""
    model = next(iter(MODELS))
    variants = [("newton", None, False), ("neupims", "serial", False), ("neupims", "serial", True),
                ("neupims", "interleaved", True), ("neupims", "neupims", True)]  # fmt: skip
    systems = [(System(model, d, scheduler=s, tensor=MODELS[model]), b) for d, s, b in variants]
    return {
        batch: [throughput(system, DATA[0], batch, SAMPLES, balanced=balanced) for system, balanced in systems]
        for batch in BATCHES
    }


def _power() -> tuple[float, float]:
    """The memory's power and energy of NeuPIMs over NPU-only: GPT-3 7B, ShareGPT, mean of the batches."""
    power, energy = [], []
    model = next(iter(MODELS))
    for batch in BATCHES:
        watts, joules = [], []
        for device in ("npu", "neupims"):
            system = System(model, device, tensor=MODELS[model])
            steps = list(_steps(system, DATA[0], batch, SAMPLES, balanced=True))
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


def _gain_table(found: Mapping[tuple[str, str, int], Mapping[str, float]]) -> Table:
    rows: Rows = [(model, data, batch, *row.values()) for (model, data, batch), row in found.items()]
    return Table("NeuPIMs' throughput over", ("model", "data", "batch", *PUBLISHED), rows)


def _ablation_table(steps: Mapping[int, Sequence[float]]) -> Table:
    columns = ("batch", "NPU+PIM", "+ two row buffers", "+ packing", "sub-batches always", "the sooner")
    return Table(
        f"{next(iter(MODELS))} on {DATA[0]}: tokens a second", columns, [(b, *row) for b, row in steps.items()]
    )


def _utilisation() -> Table:
    """The authors' table 4: GPT-3 30B, 256 sequences of ShareGPT."""
    model = "gpt3-30b" if "gpt3-30b" in MODELS else tuple(MODELS)[-1]
    rows: Rows = []
    for name, device in list(BASELINES.items())[1:]:
        system = System(model, device, tensor=MODELS[model])
        steps = list(_steps(system, DATA[0], BATCHES[len(BATCHES) // 2], SAMPLES, balanced=name != "NPU+PIM"))
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
