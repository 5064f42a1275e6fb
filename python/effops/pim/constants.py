"""What a device file may hold: its sections, each constant's kind and range, and what must hold between them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

Check = tuple[str, Callable[[Any], bool]]
Values = Mapping[str, Mapping[str, Any]]


def _is_int(x: Any) -> bool:
    return isinstance(x, int) and not isinstance(x, bool)


def _is_number(x: Any) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool) and x == x and abs(x) != float("inf")


COUNT: Check = ("an integer of 1 or more", lambda x: _is_int(x) and x >= 1)
CYCLES: Check = ("an integer of 0 or more", lambda x: _is_int(x) and x >= 0)
POSITIVE: Check = ("a number above 0", lambda x: _is_number(x) and x > 0)
NUMBER: Check = ("a number of 0 or more", lambda x: _is_number(x) and x >= 0)
FLAG: Check = ("true or false", lambda x: isinstance(x, bool))


def one_of(*words: Any) -> Check:
    # 1.0 and true equal 1, and the simulator takes neither for it.
    return " or ".join(map(repr, words)), lambda x: any(type(x) is type(w) and x == w for w in words)


DRAM = ("clock_ghz", "channels", "ranks", "bank_groups", "banks_per_group", "rows", "row_bytes", "access_bytes")
TIMES = [
    "burst",
    "tRCD",
    "tRP",
    "tRAS",
    "tCL",
    "tCWL",
    "tCCD_S",
    "tCCD_L",
    "tRRD_S",
    "tRRD_L",
    "tFAW",
    "tWR",
    "tWTR_S",
    "tWTR_L",
    "tRTP",
    "tRTRS",
    "tREFI",
    "tRFC",
]

SECTIONS: dict[str, dict[str, Check]] = {
    "memory": {
        **dict.fromkeys(DRAM, COUNT),
        "clock_ghz": POSITIVE,
        "command_buses": one_of(1, 2),
        "flat_gb_per_s": POSITIVE,
        "flat_gb": POSITIVE,
    },
    "timing": {**dict.fromkeys(TIMES, CYCLES), "burst": COUNT, "tCCD_L": COUNT, "tREFI": COUNT, "tFAW": COUNT},
    "pim": {
        "kind": one_of("banks", "near"),
        "row_buffers": one_of(1, 2),
        "comp_bytes": COUNT,
        "comp_interval": COUNT,
        "least_comps": CYCLES,
        "banks_per_activation": COUNT,
        "gwrite_cycles": COUNT,
        "result_bytes": COUNT,
        "composite": FLAG,
        "window_shared": FLAG,
        "banks_per_access": COUNT,
        "activations_per_access": COUNT,
        "peak_tflops": POSITIVE,
    },
    "processor": {
        "kind": one_of("systolic", "roofline"),
        **dict.fromkeys(("arrays", "array_rows", "array_columns", "vector_units", "vector_width"), COUNT),
        "clock_ghz": POSITIVE,
        "peak_tflops": POSITIVE,
        "launch_us": NUMBER,
        "kernels_per_request": CYCLES,
    },
    "link": dict.fromkeys(("gb_per_s", "latency_us", "node_gb_per_s", "node_latency_us"), NUMBER),
    "currents": dict.fromkeys(("VDD", "IDD0", "IDD2N", "IDD3N", "IDD4W", "IDD4R", "IDD5AB"), POSITIVE),
    "energy": dict.fromkeys(
        [
            "activate",
            "read",
            "write",
            "refresh",
            "near_read",
            "background_mw",
            "flop",
            "link_byte",
            "comp_times_read",
            "extra_row_buffer",
        ],
        NUMBER,
    ),
}

UNITS = (
    *("row_buffers", "comp_bytes", "comp_interval", "least_comps", "banks_per_activation", "gwrite_cycles"),
    *("result_bytes", "composite"),
)
NEAR = ("banks_per_access", "activations_per_access", "peak_tflops")
SYSTOLIC = ("clock_ghz", "arrays", "array_rows", "array_columns", "vector_units", "vector_width")
FLAT = ("flat_gb_per_s", "flat_gb", "access_bytes")
FLAT_ENERGY = ("read", "write", "flop", "link_byte")


def missing(values: Values) -> Iterator[str]:
    """Constants that this kind of device needs and the file lacks."""
    memory, pim, processor = (values.get(s, {}) for s in ("memory", "pim", "processor"))
    flat = "flat_gb_per_s" in memory
    needs: dict[str, Sequence[str]] = {"memory": FLAT if flat else DRAM, "timing": () if flat else TIMES}
    needs["processor"] = ("kind", *(SYSTOLIC if processor.get("kind") == "systolic" else ("peak_tflops",)))
    if pim:
        needs["pim"] = ("kind", *{"banks": UNITS, "near": NEAR}.get(pim.get("kind", ""), ()))
    if values.get("currents") and not flat:  # the power model is one formula over all of them
        needs["currents"] = tuple(SECTIONS["currents"])
    for section, names in needs.items():
        for name in names:
            if name not in values.get(section, {}):
                yield f"{section}.{name}: expected a value with its source, got nothing"


def unread(values: Values) -> Iterator[tuple[str, str, str]]:
    """Constants that this kind of device does not read: section, name and the kind."""
    memory, pim, processor = (values.get(s, {}) for s in ("memory", "pim", "processor"))
    kind = pim.get("kind", "")
    of_units: dict[str, Sequence[str]] = {
        "pim": (*UNITS, "window_shared"),
        "energy": ("comp_times_read", "extra_row_buffer"),
    }
    of_near: dict[str, Sequence[str]] = {"pim": NEAR, "energy": ("near_read",)}
    this = f"pim.kind {kind!r}" if kind else "no pim.kind"
    systolic = processor.get("kind") == "systolic"
    without: list[tuple[str, dict[str, Sequence[str]]]] = [
        (f"processor.kind {processor.get('kind')!r}", {"processor": ("peak_tflops",) if systolic else SYSTOLIC})
    ]
    if kind != "banks":
        without.append((this, of_units))
    if kind != "near":
        without.append((this, of_near))
    if "flat_gb_per_s" in memory:
        rest = {s: [n for n in SECTIONS[s] if n not in read] for s, read in (("memory", FLAT), ("energy", FLAT_ENERGY))}
        without.append(("memory.flat_gb_per_s", {"timing": TIMES, "currents": [*SECTIONS["currents"]], **rest}))
    for what, sections in without:
        for section, names in sections.items():
            for name in names:
                if name in values.get(section, {}):
                    yield section, name, what


def events(values: Values) -> dict[str, float]:
    """Picojoules of events from currents, as in Micron's power model (mA x V x ns = pJ)."""
    v = values.get("currents")
    if not v:
        return {}
    t = {name: cycles / values["memory"]["clock_ghz"] for name, cycles in values["timing"].items()}
    volt = v["VDD"]
    opened = v["IDD0"] * (t["tRAS"] + t["tRP"]) - v["IDD3N"] * t["tRAS"] - v["IDD2N"] * t["tRP"]
    return {
        "activate": volt * opened,
        "read": volt * (v["IDD4R"] - v["IDD3N"]) * t["burst"],
        "write": volt * (v["IDD4W"] - v["IDD3N"]) * t["burst"],
        "refresh": volt * (v["IDD5AB"] - v["IDD3N"]) * t["tRFC"],
        "background_mw": volt * v["IDD3N"] * values["memory"]["ranks"],
    }


def contradictions(values: Values) -> Iterator[str]:
    """What cannot be true of one device."""
    memory, timing, pim = (values.get(s, {}) for s in ("memory", "timing", "pim"))
    if "flat_gb_per_s" in memory:
        if pim:
            yield "pim.kind: expected none where memory.flat_gb_per_s stands for the memory, got " + repr(pim["kind"])
        return
    for event, pj in events(values).items():
        if pj < 0 and event not in values.get("energy", {}):  # one that the file states counts instead
            yield f"currents: expected an energy of 0 or more of {event}, got {pj:g} pJ"
    banks = memory["ranks"] * memory["bank_groups"] * memory["banks_per_group"]

    def divides(section: str, name: str, whole: int, of: str) -> Iterator[str]:
        part = values[section][name]
        if whole % part:
            yield f"{section}.{name}: expected a divisor of {of} ({whole}), got {part}"

    yield from divides("memory", "access_bytes", memory["row_bytes"], "memory.row_bytes")
    least = 16 * (timing["tRAS"] + timing["tRP"])  # rows that open and close between refreshes
    if timing["tREFI"] < least:
        yield f"timing.tREFI: expected at least 16 (tRAS + tRP) = {least}, got {timing['tREFI']}"
    if timing["tRAS"] < timing["tRCD"]:
        yield f"timing.tRAS: expected at least tRCD ({timing['tRCD']}), got {timing['tRAS']}"
    if timing["tFAW"] < timing["tRRD_L"]:
        yield f"timing.tFAW: expected at least tRRD_L ({timing['tRRD_L']}), got {timing['tFAW']}"
    if timing["tREFI"] <= 4 * timing["tRFC"]:
        yield f"timing.tREFI: expected more than 4 tRFC ({4 * timing['tRFC']}), got {timing['tREFI']}"
    if pim.get("kind") == "banks":
        yield from divides("pim", "comp_bytes", memory["row_bytes"], "memory.row_bytes")
        yield from divides("pim", "banks_per_activation", banks // memory["ranks"], "the banks of a rank")
        if pim["banks_per_activation"] > 4:
            yield f"pim.banks_per_activation: expected at most 4, as tFAW lets open, got {pim['banks_per_activation']}"
        yield from _lanes("pim.comp_bytes", pim["comp_bytes"])
    if pim.get("kind") == "near":
        yield from divides("pim", "banks_per_access", banks, "the banks of a channel")
        yield from _lanes("memory.access_bytes", memory["access_bytes"])
        waves = pim["activations_per_access"]
        if waves > 4 and waves % 4:
            yield f"pim.activations_per_access: expected 1 to 4 or a multiple of 4, got {waves}"


def _lanes(name: str, size: int) -> Iterator[str]:
    """A command's values, 16 bits each."""
    if size < 2 or size > 128 or size & (size - 1):
        yield f"{name}: expected a power of two from 2 to 128 beside processing in memory, got {size}"
