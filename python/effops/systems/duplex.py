"""Duplex (Yun et al., MICRO 2024, arXiv 2409.01141): a GPU whose memory has a second processor for what has few
operations a byte.

Continuous batching of the paper's models on `effops.pim`'s devices, a batch in full swing from the start; no constant
is fitted to the comparison.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from effops.models import load_model, shipped
from effops.pim import Device, Result, System, Workload
from effops.systems import pim_numerics
from effops.systems.claims import Claim, Moved, claims_table, closing, moved_table, nearest, sensitivity, verdict
from effops.systems.report import Curves, Report, Table
from effops.systems.runner import SHIPPED, Run


@dataclass(frozen=True)
class Setting:
    """A model, the devices of a node and the nodes, and the lengths of prompt and answer."""

    model: str
    devices: int
    nodes: int
    lengths: tuple[int, ...]


MIXTURES = (
    Setting("mixtral-8x7b", 4, 1, (256, 1024, 4096)),
    Setting("glam-143b", 8, 1, (512, 1024, 2048)),
    Setting("grok-1", 8, 2, (256, 1024, 4096)),
)
DENSE = (Setting("llama-3-70b", 4, 1, (256, 1024, 4096)), Setting("opt-66b", 4, 1, (256, 512, 1024)))
BATCHES = (32, 64, 128)
BANK_BATCHES = (32, 64)
STAGES = 2.0  # an answer's length, so many times
SYSTEMS = {  # device, scheduler, experts over all devices
    "GPU": ("h100", "processor", False),
    "Duplex": ("duplex", "duplex", False),
    "Duplex+PE": ("duplex", "co_processing", False),
    "Duplex+PE+ET": ("duplex", "co_processing", True),
}
CONSTANTS = {
    "memory.clock_ghz": ("h100", "duplex"),
    "timing.tFAW": ("h100", "duplex"),
    "timing.tRFC": ("h100", "duplex"),
    "timing.tCCD_L": ("duplex",),
    "pim.peak_tflops": ("duplex",),
    "processor.peak_tflops": ("h100", "duplex"),
    "link.gb_per_s": ("h100", "duplex"),
    "link.latency_us": ("h100", "duplex"),
    "energy.near_read": ("duplex",),
    "energy.read": ("h100", "duplex"),
    "energy.flop": ("h100", "duplex"),
}
CLAIM = (
    "2.07 times the throughput of H100 GPUs on average and up to 2.67 times, 28 % less energy and up to 42 %; up to "
    "1.8 times Bank-PIM on Mixtral, while Bank-PIM is ahead on OPT; co-processing alone 1.04 times, with "
    "tensor-parallel experts up to 1.36 times"
)


def serve(
    setting: Setting,
    system: tuple[str, str, bool],
    batch: int,
    length: int,
    devices: Mapping[str, Device] | None = None,
    *,
    twice: bool = False,
) -> Result:
    """A batch in full swing, requests joining as others leave."""
    name, scheduler, split = system
    work = Workload.gaussian(length, length, 6 * batch, seed=1).warm(batch, seed=2)
    tensor, data = setting.devices, setting.nodes
    if twice:  # first more devices a node, then more nodes
        tensor, data = (2 * tensor, data) if tensor < 8 else (tensor, 2 * data)
    device = (devices or {}).get(name, name)
    running = System(setting.model, device, scheduler=scheduler, tensor=tensor, data=data, split_experts=split)
    return running.serve(work, max_batch=batch, limit_capacity=False, max_stages=round(STAGES * length))


Rows = list[tuple[str | float | None, ...]]
Grid = dict[tuple[str, int, int], dict[str, Result]]


def grid(
    settings: Sequence[Setting], batches: Sequence[int], systems: Mapping[str, tuple[str, str, bool]],
    devices: Mapping[str, Device] | None = None, run: Run | None = None,
) -> Grid:  # fmt: skip
    found: Grid = {}
    total = sum(len(s.lengths) for s in settings) * len(batches)
    for setting in settings:
        for batch in batches:
            for length in setting.lengths:
                if run is not None:
                    run.progress(f"{setting.model}, {batch} requests of {length}", len(found), total)
                found[setting.model, batch, length] = {
                    name: serve(setting, system, batch, length, devices) for name, system in systems.items()
                }
    return found


def gain(results: Mapping[str, Result], name: str, over: str = "GPU") -> float:
    return results[name].tokens_per_second / results[over].tokens_per_second


def saving(results: Mapping[str, Result], name: str = "Duplex+PE+ET") -> float:
    return 1 - results[name].joules_per_token / results["GPU"].joules_per_token


def run(run: Run) -> Report:
    found = grid(MIXTURES, BATCHES, SYSTEMS, run=run)
    banks = {"GPU": SYSTEMS["GPU"], "Bank-PIM": ("bank_pim", "duplex", False), "Duplex": SYSTEMS["Duplex+PE+ET"]}
    beside = grid((MIXTURES[0], *DENSE), BANK_BATCHES, banks, run=run)
    run.progress("sensitivity")
    two = {name: SYSTEMS[name] for name in ("GPU", "Duplex+PE+ET")}
    sensitive = sensitivity(
        f"Mixtral, {BATCHES[-1]} requests: mean throughput and energy saved over the GPU with one constant moved",
        CONSTANTS,
        lambda devices: _summary(grid(MIXTURES[:1], BATCHES[-1:], two, devices)),
    )
    latency = _latency(run)
    claims = [*_throughput(found), *_energy(found), *_bank(beside), *_latency_claims(latency)]
    moved = _moved(found, beside, latency, claims)
    tables = [
        claims_table(claims), moved_table(moved),
        _grid_table(found), _bank_table(beside), _speed_table(), pim_numerics.table(_mixture(run), "duplex"), sensitive,
    ]  # fmt: skip
    seen = (
        f"{sum(c.near for c in claims)} of {len(claims)} figures within 25 % as they are; of the others, one published "
        f"setting moved alone closes: {closing(moved)}. Energy, "
        "co-processing and the order of systems are the paper's; throughput gains more where few tokens meet many "
        "experts. Bank-PIM is behind on Mixtral and Llama and ahead on OPT, as in the paper."
    )
    unseen = (
        "what else takes time in the authors' simulator, which was not available: here nothing but bytes, operations "
        "and links does"
    )
    models = "Mixtral, GLaM, Grok-1, Llama 3 70B, OPT 66B (sizes only)"
    curves, problems = _curves(found), _problems(found)
    return Report("duplex", models, CLAIM, tables, curves, verdict(claims), seen, unseen, problems)


def _mixture(run: Run) -> Run:
    """The shipped mixture of experts in the place of the shipped dense model; another model stays."""
    if run.name != SHIPPED:
        return run
    return Run(
        lambda: (load_model(shipped.moe_dir(), dtype=torch.float32), run.tokenizer),
        "code-moe-8m (shipped)",
        bar=run.bar,
    )


def _summary(found: Grid) -> dict[str, float]:
    rows = list(found.values())
    return {
        "throughput": statistics.fmean(gain(r, "Duplex+PE+ET") for r in rows),
        "energy saved": statistics.fmean(saving(r) for r in rows),
    }


def _throughput(found: Grid) -> list[Claim]:
    rows = list(found.values())
    full = [gain(r, "Duplex+PE+ET") for r in rows]
    return [
        Claim("throughput over GPU, mean", 2.07, statistics.fmean(full)),
        Claim("throughput over GPU, most", 2.67, max(full)),
        Claim("Duplex without co-processing, most", 2.51, max(gain(r, "Duplex") for r in rows)),
        Claim("co-processing over Duplex, mean", 1.04, statistics.fmean(gain(r, "Duplex+PE", "Duplex") for r in rows)),
        Claim("with tensor-parallel experts, most", 1.36, max(gain(r, "Duplex+PE+ET", "Duplex") for r in rows)),
    ]


def _energy(found: Grid) -> list[Claim]:
    published = {"mixtral-8x7b": 0.3328, "glam-143b": 0.4203, "grok-1": 0.3459}
    claims = [Claim("energy saved, mean", 0.2819, statistics.fmean(saving(r) for r in found.values()))]
    for model, figure in published.items():
        rows = [r for (m, _, _), r in found.items() if m == model]
        if rows:
            claims.append(Claim(f"energy saved, most, {model}", figure, max(map(saving, rows))))
    return claims


def _bank(beside: Grid) -> list[Claim]:
    first = MIXTURES[0]
    rows = {key: r for key, r in beside.items() if key[0] == first.model}
    ahead = [gain(r, "Duplex", "Bank-PIM") for r in rows.values()]
    small, large = BANK_BATCHES[0], BANK_BATCHES[-1]
    short, long = first.lengths[0], first.lengths[-1]
    return [
        Claim("Duplex over Bank-PIM on Mixtral, mean", 1.49, statistics.fmean(ahead)),
        Claim("Duplex over Bank-PIM on Mixtral, most", 1.80, max(ahead)),
        Claim(f"Bank-PIM over GPU, {small} requests of {long}", 2.17, gain(rows[first.model, small, long], "Bank-PIM")),
        Claim(
            f"Bank-PIM over GPU, {large} requests of {short}", 1.18, gain(rows[first.model, large, short], "Bank-PIM")
        ),
        Claim(f"Duplex over GPU, {large} requests of {short}", 2.05, gain(rows[first.model, large, short], "Duplex")),
    ]


def _latency(run: Run) -> dict[int, list[float]]:
    """GLaM with 64 requests, the paper's figure 12: by their length, by what share Duplex' median time between tokens
    and all techniques' median time of a request, from its joining, are below the GPU's and twice as many GPUs'."""
    setting = MIXTURES[min(1, len(MIXTURES) - 1)]
    below = {}
    for length in setting.lengths:
        run.progress(f"{setting.model}: latency, requests of {length}")
        gpu, plain, full = (serve(setting, SYSTEMS[n], 64, length) for n in ("GPU", "Duplex", "Duplex+PE+ET"))
        twice = serve(setting, SYSTEMS["GPU"], 64, length, twice=True)
        below[length] = [
            1 - plain.between_tokens["p50"] / gpu.between_tokens["p50"],
            1 - full.in_batch["p50"] / gpu.in_batch["p50"],
            1 - full.in_batch["p50"] / twice.in_batch["p50"],
        ]
    return below


def _latency_claims(below: Mapping[int, Sequence[float]]) -> list[Claim]:
    median, whole, whole_twice = (statistics.fmean(column) for column in zip(*below.values(), strict=True))
    return [
        Claim("GLaM: median time between tokens below GPU's, Duplex", 0.583, median),
        Claim("GLaM: median end-to-end time below GPU's", 0.602, whole),
        Claim("GLaM: median end-to-end time below twice the GPUs'", 0.3538, whole_twice),
    ]


def _moved(found: Grid, beside: Grid, latency: Mapping[int, Sequence[float]], claims: Sequence[Claim]) -> list[Moved]:
    """Claims that are not near, with the one value of batch size, length or model that is nearest to the paper's."""

    def by(grid: Grid, what: str) -> dict[str, dict[str, float]]:
        """The figure of this name from parts of a grid, each part with one value of one setting."""
        parts: dict[str, dict[str, Grid]] = {"batch": {}, "lengths": {}, "model": {}}
        of = {s.model: s.lengths for s in (*MIXTURES, *DENSE)}
        for key, results in grid.items():
            model, batch, length = key
            place = ("shortest", "middle", "longest")[-1 if length == of[model][-1] else of[model].index(length)]
            for setting, value in (("batch", str(batch)), ("lengths", place), ("model", model)):
                parts[setting].setdefault(value, {})[key] = results
        figures: dict[str, dict[str, float]] = {}
        for setting, values in parts.items():
            if len(values) > 1:
                figures[setting] = {v: _figures(part)[what] for v, part in values.items()}
        return figures

    mixtral = {key: r for key, r in beside.items() if key[0] == MIXTURES[0].model}
    moved = []
    for claim in claims:
        if claim.near:
            continue
        if claim.what in _figures(found):
            moved += nearest(claim, **by(found, claim.what))
        elif claim.what in _figures(mixtral):
            moved += nearest(claim, **by(mixtral, claim.what))
        else:
            columns = zip(_latency_claims(latency), zip(*latency.values(), strict=True), strict=True)
            for other, column in columns:
                if other.what == claim.what and len(column) > 1:
                    lengths = map(str, latency)
                    moved += nearest(claim, lengths=dict(zip(lengths, column, strict=True)))
    return moved


def _figures(part: Grid) -> dict[str, float]:
    """Our figures of the claims that a grid gives, by their names."""
    first = next(iter(part.values()))
    if "Bank-PIM" in first:
        ahead = [gain(r, "Duplex", "Bank-PIM") for r in part.values()]
        names = ("Duplex over Bank-PIM on Mixtral, mean", "Duplex over Bank-PIM on Mixtral, most")
        return dict(zip(names, (statistics.fmean(ahead), max(ahead)), strict=True))
    return {c.what: c.ours for c in (*_throughput(part), _energy(part)[0])}


def _problems(found: Grid) -> list[str]:
    problems = []
    for key, r in found.items():
        for slower, faster in (("Duplex", "Duplex+PE"), ("GPU", "Duplex+PE")):
            if gain(r, faster, slower) < 0.999:
                problems.append(f"{key}: {faster} is slower than {slower}")
    return problems


def _grid_table(found: Grid) -> Table:
    rows: Rows = [
        (*key, r["GPU"].tokens_per_second, *(gain(r, name) for name in SYSTEMS if name != "GPU"), 100 * saving(r))
        for key, r in found.items()
    ]
    columns = ("model", "batch", "length", "GPU tokens/s", *(n for n in SYSTEMS if n != "GPU"), "energy saved %")
    return Table("throughput over the GPU", columns, rows, "length: of prompt and answer; energy: Duplex+PE+ET a token")


def _bank_table(beside: Grid) -> Table:
    rows: Rows = [(*key, gain(r, "Bank-PIM"), gain(r, "Duplex")) for key, r in beside.items()]
    return Table("throughput over the GPU", ("model", "batch", "length", "Bank-PIM", "Duplex+PE+ET"), rows)


def _speed_table() -> Table:
    """The paper's figure 8 without area and energy: time of a GEMM of few rows, Logic-PIM's as 1."""
    rows: Rows = []
    for operations in (1, 2, 4, 8, 16, 32):
        times = {}
        for name in ("bank_pim", "duplex", "h100"):
            device = Device.load(name)
            system = System(MIXTURES[0].model, device, tensor=MIXTURES[0].devices)
            near = name != "h100"
            rate = system.rates()["near_gb_per_s" if near else "read_gb_per_s"]
            peak = device["pim.peak_tflops" if near else "processor.peak_tflops"]
            times[name] = max(1 / rate, operations / (1e3 * peak))
        rows.append((operations, *(times["duplex"] / times[name] for name in ("bank_pim", "duplex", "h100"))))
    columns = ("operations a byte", "Bank-PIM", "Logic-PIM", "xPU")
    return Table("speed of a matrix that is read once, Logic-PIM's as 1", columns, rows)


def _curves(found: Grid) -> list[Curves]:
    return [
        Curves(
            f"{s.model}, {BATCHES[-1]} requests", "length of prompt and answer", "throughput over the GPU",
            {n: [(x, gain(found[s.model, BATCHES[-1], x], n)) for x in s.lengths] for n in SYSTEMS if n != "GPU"},
        )
        for s in MIXTURES
    ]  # fmt: skip
