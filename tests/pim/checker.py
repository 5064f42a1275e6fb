"""Reads a command trace beside a device file and says which constraint it breaks; shares no code with the simulator."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from itertools import pairwise

from effops.pim import Device

# Intervals that a refresh may be early or late. JEDEC allows eight; the simulator's controller closes its rows once one
# is due, and begins no row of the units that it would interrupt.
POSTPONED = 1


@dataclass
class Row:
    open: bool = False
    row: int = -1
    activated: int = -(10**9)
    precharged: int = -(10**9)
    read: int = -(10**9)
    written: int = -(10**9)  # end of the data


@dataclass
class Checker:
    device: Device
    problems: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        d = self.device
        self.t = {name: c.value for name, c in d.constants["timing"].items()}
        self.p = {name: c.value for name, c in d.constants.get("pim", {}).items()}
        self.ranks = d["memory.ranks"]
        self.per_group = d["memory.banks_per_group"]
        self.per_rank = d["memory.bank_groups"] * self.per_group
        self.burst = self.t["burst"]

    def need(self, holds: bool, command: tuple, what: str) -> None:
        if not holds:
            self.problems.append(f"{what}: {command}")

    def bundle(self, first: tuple[int, int]) -> set[tuple[int, int]]:
        """The banks of a near access, by its first."""
        start = first[0] * self.per_rank + first[1]
        return {divmod(b, self.per_rank) for b in range(start, start + self.p["banks_per_access"])}

    def ranks_of(self, op: str, first: tuple[int, int]) -> set[int]:
        """The ranks at whose banks a command is at work; the header of composite commands is at none."""
        if op.startswith("near"):
            return {rank for rank, _ in self.bundle(first)}
        if op in ("comp", "result", "pim_precharge"):
            return set(range(self.ranks))
        return set() if op == "header" else {first[0]}

    def group(self, rank: int, bank: int) -> tuple[int, int]:
        return rank, bank // self.per_group

    def check(self, trace: list[tuple]) -> list[str]:
        t, p = self.t, self.p
        rows: dict[tuple[int, int], Row] = defaultdict(Row)
        near: dict[tuple[int, int], Row] = defaultdict(Row)
        acts: dict[int, list[tuple[int, int, bool, tuple]]] = defaultdict(list)  # cycle, how many, grouped, group
        columns: list[tuple[int, tuple, bool]] = []
        data: list[tuple[int, int, int]] = []  # from, to, rank
        buses: dict[int, list[int]] = defaultdict(list)
        opened: dict[tuple[int, int], int] = {}  # units' rows: when
        unit_closed = -(10**9)
        comp_end = vector_ready = near_read = -(10**9)
        sum_start: int | None = None
        sum_end = -(10**9)
        refreshed: dict[int, list[int]] = defaultdict(list)
        last_result = -(10**9)

        for command in sorted(trace, key=lambda c: c[0]):
            cycle, op, rank, bank, row, count = command
            key = (rank, bank)
            need = lambda holds, what, c=command: self.need(holds, c, what)  # noqa: E731
            two = self.device.get("memory.command_buses") == 2
            bus = 2 if op.startswith("near") else int(two and op in ("read", "write", "comp", "result"))
            buses[bus].append(cycle)
            for r in self.ranks_of(op, key):
                need(not refreshed[r] or cycle >= refreshed[r][-1] + t["tRFC"], "tRFC")

            if op == "activate":
                b = rows[key]
                need(not b.open, "activates an open row")
                need(
                    not any(n.open and (rank, bank) in self.bundle(k) for k, n in near.items()), "bank of a near access"
                )
                need(cycle >= b.precharged + t["tRP"], "tRP")
                need(cycle >= b.activated + t["tRAS"] + t["tRP"], "tRC")
                if p.get("row_buffers") == 1:
                    need(
                        not opened and cycle >= unit_closed + t["tRP"],
                        "ordinary access beside units with one row buffer",
                    )
                b.open, b.row, b.activated = True, row, cycle
                acts[rank].append((cycle, 1, False, self.group(rank, bank)))
            elif op == "precharge":
                b = rows[key]
                need(b.open, "precharges a closed row")
                need(cycle >= b.activated + t["tRAS"], "tRAS")
                need(cycle >= b.read + t["tRTP"], "tRTP")
                need(cycle >= b.written + t["tWR"], "tWR")
                b.open, b.precharged = False, cycle
            elif op in ("read", "write"):
                b, write = rows[key], op == "write"
                need(b.open and b.row == row, "column of a row that is not open")
                need(cycle >= b.activated + t["tRCD"], "tRCD")
                at = cycle + (t["tCWL"] if write else t["tCL"])
                for before, group, wrote in columns[-8:]:
                    need(cycle >= before + t["tCCD_S"], "tCCD_S")
                    need(group != self.group(rank, bank) or cycle >= before + t["tCCD_L"], "tCCD_L")
                    if wrote and not write:
                        end = before + t["tCWL"] + self.burst
                        need(cycle >= end + t["tWTR_S"], "tWTR_S")
                        need(group != self.group(rank, bank) or cycle >= end + t["tWTR_L"], "tWTR_L")
                columns.append((cycle, self.group(rank, bank), write))
                data.append((at, at + self.burst, rank))
                if write:
                    b.written = at + self.burst
                else:
                    b.read = cycle
            elif op == "refresh":
                mine = [b for (r, _), b in rows.items() if r == rank]
                mine += [b for k, b in near.items() if rank in self.ranks_of("near_activate", k)]
                for b in mine:
                    need(not b.open and cycle >= b.precharged + t["tRP"], "refresh with an open row")
                need(not opened and cycle >= unit_closed + t["tRP"], "refresh with the units' rows open")
                refreshed[rank].append(cycle)
            elif op == "header":
                need(p["composite"], "header without composite commands")
            elif op == "gwrite":
                b = rows[key]
                need(not b.open and cycle >= b.precharged + t["tRP"], "gwrite on an open bank")
                need(cycle >= b.activated + t["tRAS"] + t["tRP"], "tRC")
                need(cycle + t["tRCD"] >= comp_end, "gwrite under products")
                vector_ready = cycle + t["tRCD"] + p["gwrite_cycles"]
                b.activated, b.precharged = cycle, max(vector_ready, cycle + t["tRAS"])
                acts[rank].append((cycle, 1, False, self.group(rank, bank)))
            elif op == "group_activate":
                need(cycle >= unit_closed + t["tRP"], "tRP of the units' rows")
                if p["row_buffers"] == 1:
                    for b in rows.values():
                        need(not b.open and cycle >= b.precharged + t["tRP"], "units beside an open row")
                for i in range(count):
                    need((rank, bank + i) not in opened, "opens a units' row twice")
                    opened[rank, bank + i] = cycle
                acts[rank].append((cycle, count, True, self.group(rank, bank)))
            elif op == "comp":
                need(len(opened) == self.ranks * self.per_rank, "products without all rows open")
                need(not opened or cycle >= max(opened.values()) + t["tRCD"], "tRCD of the units' rows")
                need(cycle >= comp_end, "products overlap")
                need(cycle >= vector_ready, "products before their vector")
                sum_start = cycle if sum_start is None else sum_start
                comp_end = cycle + count * p["comp_interval"]
                sum_end = max(comp_end, sum_start + p["least_comps"] * p["comp_interval"])
            elif op == "result":
                need(sum_start is not None and cycle >= sum_end, "result before its sum")
                need(cycle >= last_result + t["tCCD_L"], "tCCD_L of results")
                data.append((cycle + t["tCL"], cycle + t["tCL"] + count * self.burst, -1))
                last_result, sum_start = cycle, None
            elif op == "pim_precharge":
                need(bool(opened) and cycle >= max(opened.values()) + t["tRAS"], "tRAS of the units' rows")
                need(cycle >= comp_end + t["tRTP"], "closes rows under products")
                opened, unit_closed = {}, cycle
            elif op == "near_activate":
                b = near[key]
                need(not b.open and cycle >= b.precharged + t["tRP"], "near row open, or tRP")
                late = (p["activations_per_access"] - 1) // 4 * t["tFAW"]
                b.open, b.row, b.activated = True, row, cycle + late
                mine = self.bundle(key)
                for other in mine:
                    need(not rows[other].open, "near access to a bank that is open")
                    need(cycle >= rows[other].precharged + t["tRP"], "tRP of a bank before a near access")
                for r in {r for r, _ in mine}:
                    for i in range(0, p["activations_per_access"], 4):
                        step = (cycle + i // 4 * t["tFAW"], min(4, p["activations_per_access"] - i), False)
                        acts[r].append((*step, self.group(r, min(x for y, x in mine if y == r))))
            elif op == "near_read":
                b = near[key]
                need(b.open and b.row == row and cycle >= b.activated + t["tRCD"], "near read without its row")
                need(cycle >= near_read + t["tCCD_L"], "tCCD_L of the near path")
                b.read = near_read = cycle
            elif op == "near_precharge":
                b = near[key]
                need(b.open and cycle >= b.activated + t["tRAS"] and cycle >= b.read + t["tRTP"], "near precharge")
                b.open, b.precharged = False, cycle
        self.activations(acts)
        self.data_bus(data)
        for bus, cycles in buses.items():
            self.need(len(set(cycles)) == len(cycles), (bus,), "two commands in a cycle")
        end = max((cycle for cycle, *_ in trace), default=0)
        for r in range(self.ranks):
            for i, cycle in enumerate([*refreshed[r], end]):  # refresh i is due at i + 1 intervals, the next by the end
                self.need(cycle <= (i + 1 + POSTPONED) * t["tREFI"], (r, i, cycle), "tREFI, late")
            for i, cycle in enumerate(refreshed[r]):
                self.need(cycle >= (i + 1 - POSTPONED) * t["tREFI"], (r, i, cycle), "tREFI, early")
        return self.problems

    def activations(self, acts: dict[int, list[tuple[int, int, bool, tuple]]]) -> None:
        t, shared = self.t, self.p.get("window_shared", True)
        for rank, events in acts.items():
            events.sort()
            for i, (cycle, n, grouped, group) in enumerate(events):
                window = n
                for before, m, was_grouped, other in reversed(events[:i]):
                    if before <= cycle - max(t["tFAW"], t["tRRD_L"]):
                        break
                    self.need(cycle >= before + t["tRRD_S"], (rank, before, cycle), "tRRD_S")
                    self.need(group != other or cycle >= before + t["tRRD_L"], (rank, before, cycle), "tRRD_L")
                    if before > cycle - t["tFAW"] and (shared or not grouped or was_grouped):
                        window += m
                self.need(window <= 4, (rank, cycle, window), "tFAW")

    def data_bus(self, data: list[tuple[int, int, int]]) -> None:
        data.sort()
        for (_, end, a), (start, _, b) in pairwise(data):
            gap = self.t["tRTRS"] if a != b and a >= 0 and b >= 0 else 0
            self.need(start >= end + gap, (end, start, a, b), "data bus")
