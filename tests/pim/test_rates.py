"""The fast mode's sustained rates, over pins and near paths, against every command of streams of other lengths."""

from __future__ import annotations

import pytest
from effops import _host
from effops.pim import Device, ModelShape, System
from effops.pim.simulate import bandwidth

SMALL = ModelShape(layers=4, hidden=1024, heads=8, kv_heads=8, head_dim=128, intermediate=4096, vocab=0, ffn_matrices=2)
SYSTEMS = {name: System(SMALL, name) for name in ("npu", "newton", "neupims", "h100", "duplex", "bank_pim")}


def simulate(device: Device, transfers=(), near: int = 0) -> dict:
    return _host.pim.simulate_channel(device.numbers, list(transfers), [], near, True, False)


def gb_per_s(device: Device, accesses: int, cycles: int, banks: int = 1) -> float:
    """Of all channels."""
    moved = accesses * banks * device["memory.access_bytes"] * device["memory.channels"]
    return moved / (cycles / device["memory.clock_ghz"])


@pytest.mark.parametrize("accesses", [20_000, 200_000])
@pytest.mark.parametrize("write", [False, True])
@pytest.mark.parametrize("name", sorted(SYSTEMS))
def test_reads_and_writes_are_within_two_percent_of_every_command(name: str, write: bool, accesses: int) -> None:
    device, rates = SYSTEMS[name].device, SYSTEMS[name].rates()
    fast = rates["write_gb_per_s" if write else "read_gb_per_s"]
    cycles = simulate(device, [(accesses, write)])["transfer_cycles"]
    assert fast == pytest.approx(gb_per_s(device, accesses, cycles), rel=0.02)
    assert 0.85 * bandwidth(device) < fast < bandwidth(device)


@pytest.mark.parametrize("name", sorted(SYSTEMS))
def test_an_operator_s_reads_and_writes_add_up(name: str) -> None:
    """Operands read, then a result written, which the fast mode adds: within two percent of every command."""
    device, rates = SYSTEMS[name].device, SYSTEMS[name].rates()
    transfers = [(9000, False), (600, True)] * 8
    ns = sum(n * device["memory.access_bytes"] / rates[f"{'write' if w else 'read'}_gb_per_s"] for n, w in transfers)
    cycles = simulate(device, transfers)["transfer_cycles"]
    assert ns * device["memory.channels"] == pytest.approx(cycles / device["memory.clock_ghz"], rel=0.02)


@pytest.mark.parametrize("accesses", [5000, 8601, 20_000, 200_000])  # 8601: an expert of Mixtral in Duplex
@pytest.mark.parametrize("name", ["duplex", "bank_pim"])
def test_near_reads_are_within_two_percent_of_every_command(name: str, accesses: int) -> None:
    device, fast = SYSTEMS[name].device, SYSTEMS[name].rates()["near_gb_per_s"]
    banks = device["pim.banks_per_access"]
    cycles = simulate(device, near=accesses)["near_cycles"]
    assert fast == pytest.approx(gb_per_s(device, accesses, cycles, banks), rel=0.02)
    assert bandwidth(device) < fast < gb_per_s(device, 1, device["timing.tCCD_L"], banks)


@pytest.mark.parametrize("change", [("timing.tFAW", 60), ("timing.tRP", 30), ("pim.banks_per_access", 16)])
def test_near_reads_of_other_devices(change: tuple[str, int]) -> None:
    device = SYSTEMS["duplex"].device.replace(*change)
    fast = System(SMALL, device).rates()["near_gb_per_s"]
    cycles = simulate(device, near=30_000)["near_cycles"]
    assert fast == pytest.approx(gb_per_s(device, 30_000, cycles, device["pim.banks_per_access"]), rel=0.02)


@pytest.mark.parametrize("name", sorted(set(SYSTEMS) - {"duplex", "bank_pim"}))
def test_no_near_rate_without_a_near_processor(name: str) -> None:
    assert SYSTEMS[name].rates()["near_gb_per_s"] == 0


@pytest.mark.parametrize("accesses", [10_000, 100_000])
def test_near_reads_beside_a_stream_are_within_two_percent_of_every_command(accesses: int) -> None:
    """Both share the activations of a window: while a stream lasts, near reads take longer than alone."""
    device, rates = SYSTEMS["duplex"].device, SYSTEMS["duplex"].rates()
    near, stream = (gb_per_s(device, 1, 1, banks) for banks in (device["pim.banks_per_access"], 1))
    alone = accesses * near / rates["near_gb_per_s"]
    fast = alone * rates["units_stretch"]
    transfers = round(fast / rates["transfer_stretch"] * rates["read_gb_per_s"] / stream)
    report = simulate(device, [(transfers, False)], accesses)
    assert report["near_cycles"] > 1.03 * alone
    assert report["near_cycles"] == pytest.approx(fast, rel=0.02)
    assert report["transfer_cycles"] == pytest.approx(fast, rel=0.02)
