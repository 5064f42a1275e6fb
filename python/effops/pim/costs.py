"""How long a product with a matrix takes on a device's two sides: which of them should have it."""

from __future__ import annotations

from functools import cache

from effops import _host
from effops.pim.device import Device
from effops.pim.model import ModelShape
from effops.pim.simulate import System, default_scheduler

_ANY = ModelShape(layers=1, hidden=1, heads=1, kv_heads=1, head_dim=1, intermediate=1, vocab=0)


class Costs:
    """Nanoseconds of a matrix ``[out, in]`` of 16-bit values times ``rows`` vectors."""

    def __init__(self, device: Device) -> None:
        scheduler = "duplex" if device.get("pim.kind") == "near" else default_scheduler(device)
        self._system = System(_ANY, device, scheduler=scheduler)._system
        self.of_units = cache(self._of_units)
        self.of_processor = cache(self._of_processor)

    def _of_units(self, rows: int, out: int, inputs: int) -> float:
        return self._system.units_ns(rows, out, inputs) if rows else 0.0

    def _of_processor(self, rows: int, out: int, inputs: int) -> float:
        return self._system.processor_ns(rows, out, inputs) if rows else 0.0

    def crossover(self, out: int, inputs: int, most: int = 4096) -> int:
        """The most vectors with which the units are not slower than the processor."""
        low, high = 0, most
        while low < high:
            middle = (low + high + 1) // 2
            if self.of_units(middle, out, inputs) <= self.of_processor(middle, out, inputs):
                low = middle
            else:
                high = middle - 1
        return low

    def split_experts(self, tokens: list[int], products: list[tuple[int, int]]) -> list[bool]:
        """Which experts the units take, given the tokens of each and the sizes of an expert's matrices
        (Duplex: more than there are bundles lie in these, each served by one side)."""
        processor = [sum(self.of_processor(n, *p) for p in products) for n in tokens]
        units = [sum(self.of_units(n, *p) for p in products) for n in tokens]
        return _host.pim.split_experts(tokens, processor, units, self._system.sections(len(tokens)))[3]
