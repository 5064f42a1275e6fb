"""Device files: every constant is sourced, wrong files are named errors, variants are checked as files are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from effops.pim import Device, DeviceError
from effops.pim.device import SHIPPED, shipped


@pytest.mark.parametrize("name", shipped())
def test_every_constant_of_a_shipped_device_has_a_source(name: str) -> None:
    device = Device.load(name)
    assert device.about
    for section, entries in device.constants.items():
        for key, constant in entries.items():
            assert len(device.sources[constant.source]) > 8, (section, key)


def write(path: Path, **changes: object) -> Path:
    """The NPU's file with ``section__name`` set; None removes."""
    raw = json.loads((SHIPPED / "npu.json").read_text())
    for key, value in changes.items():
        section, _, name = key.partition("__")
        target = raw.setdefault(section, {}) if name else raw
        if value is None:
            target.pop(name or section)
        else:
            target[name or section] = value
    path.write_text(json.dumps(raw))
    return path


NEAR = {f"pim__{n}": [8, "paper"] for n in ("banks_per_access", "activations_per_access", "peak_tflops")}


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"memory__channels": [0, "paper"]}, "memory.channels: expected an integer of 1 or more, got 0"),
        ({"memory__channels": [True, "paper"]}, "memory.channels: expected an integer of 1 or more, got True"),
        ({"memory__clock_ghz": ["1", "paper"]}, "memory.clock_ghz: expected a number above 0, got '1'"),
        ({"memory__channels": 32}, "memory.channels: expected [value, source]"),
        ({"memory__channels": [32, "hearsay"]}, "memory.channels: expected a source among"),
        ({"memory__channels": [32, "own"]}, "expected a note with the reason of an own choice"),
        ({"memory__channels": None}, "memory.channels: expected a value with its source, got nothing"),
        ({"timing__tFAW": None}, "timing.tFAW: expected a value with its source"),
        ({"timing__tXYZ": [1, "paper"]}, "timing.tXYZ: expected one of"),
        ({"cache": {}}, "cache: expected one of memory, timing"),
        (
            {"memory__access_bytes": [60, "paper"]},
            "memory.access_bytes: expected a divisor of memory.row_bytes (1024), got 60",
        ),
        ({"timing__tRAS": [13, "paper"]}, "timing.tRAS: expected at least tRCD (14), got 13"),
        ({"timing__tREFI": [1000, "paper"]}, "timing.tREFI: expected more than 4 tRFC (1040), got 1000"),
        ({"timing__tREFI": [700, "paper"], "timing__tRFC": [10, "paper"]}, "timing.tREFI: expected at least 16 (tRAS"),
        ({"pim__kind": ["banks", "paper"]}, "pim.row_buffers: expected a value with its source"),
        ({"processor__kind": ["tpu", "paper"]}, "processor.kind: expected 'systolic' or 'roofline', got 'tpu'"),
        ({"base": "nowhere"}, "expected a device file, got nothing"),
        ({"memory__command_buses": [True, "paper"]}, "memory.command_buses: expected 1 or 2, got True"),
        ({"currents__IDD0": None}, "currents.IDD0: expected a value with its source, got nothing"),
        ({"currents__IDD0": [20, "paper"]}, "currents: expected an energy of 0 or more of activate, got -1764 pJ"),
        ({"currents__IDD4R": [50, "paper"]}, "currents: expected an energy of 0 or more of read, got -12 pJ"),
        (
            {"processor__peak_tflops": [9, "paper"]},
            "processor.peak_tflops: expected none: a device with processor.kind",
        ),
        ({"pim__composite": [True, "paper"], "pim__kind": ["near", "paper"], **NEAR}, "pim.composite: expected none"),
        ({"energy__near_read": [9, "paper"]}, "energy.near_read: expected none: a device with no pim.kind"),
        (
            {"memory__flat_gb_per_s": [9, "paper"], "memory__flat_gb": [9, "paper"]},
            "expected none: a device with memory.",
        ),
    ],
)
def test_a_wrong_file_says_what_is_wrong(changes: dict, words: str, tmp_path: Path) -> None:
    path = write(tmp_path / "mine.json", **changes)
    with pytest.raises(DeviceError) as error:
        Device.load(path)
    assert words in str(error.value) and str(error.value).startswith(str(tmp_path))


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match="expected a device file, got nothing"):
        Device.load(tmp_path / "none.json")
    (tmp_path / "text.json").write_text("{")
    with pytest.raises(DeviceError, match="expected JSON"):
        Device.load(tmp_path / "text.json")
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(DeviceError, match="expected an object of sections"):
        Device.load(tmp_path / "list.json")
    with pytest.raises(DeviceError, match=r"expected one of a100, .* or a file, got 'neupim'"):
        Device.load("neupim")
    for name, base in (("a", "b.json"), ("b", "a.json")):
        (tmp_path / f"{name}.json").write_text(json.dumps({"base": base}))
    with pytest.raises(DeviceError, match="leads back here"):
        Device.load(tmp_path / "a.json")


def test_a_file_over_a_base_keeps_the_base_s_constants(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(
        json.dumps({"base": "neupims", "sources": {"lab": "measured in the lab"}, "timing": {"tFAW": [24, "lab"]}})
    )
    mine = Device.load(path)
    assert mine["timing.tFAW"] == 24 and mine.constants["timing"]["tFAW"].source == "lab"
    assert mine["pim.row_buffers"] == 2 and mine["memory.channels"] == 32


LAB = {"sources": {"lab": "measured in the lab"}}


def test_of_a_base_of_another_kind_only_what_is_read_stays(tmp_path: Path) -> None:
    """What the file itself states is refused where nothing reads it, what comes with the base falls away."""
    path = tmp_path / "mine.json"
    near = {name: [8, "lab"] for name in ("banks_per_access", "activations_per_access", "peak_tflops")}
    path.write_text(json.dumps({"base": "neupims", **LAB, "pim": {"kind": ["near", "lab"], **near}}))
    mine = Device.load(path)
    assert set(mine.constants["pim"]) == {"kind", *near} and set(mine.constants["energy"]) == {"flop"}
    flat = {"flat_gb_per_s": [1000, "lab"], "flat_gb": [80, "lab"]}
    path.write_text(json.dumps({"base": "npu", **LAB, "memory": flat}))
    mine = Device.load(path)
    assert set(mine.constants["memory"]) == {*flat, "access_bytes"} and mine.numbers["energy"]["flop"] == 0.75
    assert "timing" not in mine.constants and "currents" not in mine.constants
    path.write_text(json.dumps({"base": "a100", **LAB, "currents": {"VDD": [1.1, "lab"]}}))
    with pytest.raises(DeviceError, match=r"currents.VDD: expected none: a device with memory.flat_gb_per_s does not"):
        Device.load(path)


def test_a_stated_energy_stands_before_one_from_currents(tmp_path: Path) -> None:
    path = write(tmp_path / "mine.json", currents__IDD0=[20, "paper"], energy__activate=[900, "paper"])
    assert Device.load(path).numbers["energy"]["activate"] == 900


def test_a_variant_is_checked() -> None:
    device = Device.load("neupims")
    assert device.replace("timing.tFAW", 24)["timing.tFAW"] == 24
    with pytest.raises(DeviceError, match=r"timing.tFAW: expected an integer of 1 or more, got -1"):
        device.replace("timing.tFAW", -1)
    with pytest.raises(KeyError, match=r"no constant 'timing.tXYZ'"):
        device.replace("timing.tXYZ", 1)


def test_energies_of_events_from_currents_by_hand() -> None:
    energy = Device.load("neupims").numbers["energy"]
    assert energy["activate"] == pytest.approx(1.2 * (65 * 48 - 55 * 34 - 40 * 14))
    assert energy["read"] == pytest.approx(1.2 * (390 - 55) * 2)
    assert energy["comp"] == pytest.approx(4 * energy["read"])
    assert energy["gwrite"] == pytest.approx(16 * energy["read"])
    assert energy["extra_row_buffer_mw"] == energy["background_mw"] == pytest.approx(2 * 1.2 * 55)


@pytest.mark.parametrize(
    "name, key, value, words",
    [
        ("neupims", "pim.comp_bytes", 1, "pim.comp_bytes: expected a power of two from 2 to 128"),
        ("neupims", "pim.comp_bytes", 256, "pim.comp_bytes: expected a power of two from 2 to 128"),
        ("neupims", "pim.banks_per_activation", 8, "pim.banks_per_activation: expected at most 4"),
        ("duplex", "pim.activations_per_access", 6, "expected 1 to 4 or a multiple of 4, got 6"),
        (
            "duplex",
            "pim.banks_per_access",
            5,
            "pim.banks_per_access: expected a divisor of the banks of a channel (32)",
        ),
    ],
)
def test_units_that_cannot_be(name: str, key: str, value: int, words: str) -> None:
    with pytest.raises(DeviceError) as error:
        Device.load(name).replace(key, value)
    assert words in str(error.value)
