"""The systems that a device is compared with."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from effops.pim.device import Device
from effops.pim.simulate import default_scheduler, schedulers


@dataclass(frozen=True)
class Contender:
    """A device under a scheduler, by the name that the papers give it."""

    name: str
    device: Device
    scheduler: str
    options: dict[str, Any] = field(default_factory=dict)
    balanced: bool = True  # requests to channels by least load


def lineup(device: str | Path) -> list[Contender]:
    """The paper's baselines of a shipped device, then the device; one's own under every scheduler it can follow."""
    if str(device) in ("neupims", "newton", "npu", "a100"):
        systems = [("GPU-only", "a100"), ("NPU-only", "npu"), ("NPU+PIM, blocked", "newton"), ("NeuPIMs", "neupims")]
        return [_contender(name, d, balanced=d != "newton") for name, d in systems]
    if str(device) in ("duplex", "bank_pim", "h100"):
        duplex = Device.load("duplex")
        return [
            _contender("GPU-only", "h100"),
            _contender("Bank-PIM", "bank_pim", "duplex"),
            Contender("Duplex", duplex, "duplex"),
            Contender("Duplex+PE+ET", duplex, "co_processing", {"split_experts": True}),
        ]
    own = Device.load(device)
    names = schedulers(own)
    if len(names) == 1:
        return [Contender(own.name, own, names[0])]
    return [Contender(f"{own.name}, {'processor alone' if s == 'processor' else s}", own, s) for s in names]


def _contender(name: str, device: str, scheduler: str | None = None, *, balanced: bool = True) -> Contender:
    loaded = Device.load(device)
    return Contender(name, loaded, scheduler or default_scheduler(loaded), balanced=balanced)
