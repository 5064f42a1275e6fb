"""Devices as data files: every constant with the source that it was taken from."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from effops.pim.constants import SECTIONS, contradictions, events, missing, unread

SHIPPED = Path(__file__).with_name("devices")


class DeviceError(ValueError):
    """A device file that cannot be used: the file, the constant, what was expected and what stands there."""


@dataclass(frozen=True)
class Constant:
    """A number of a device, where it is from, and how it was read from there."""

    value: Any
    source: str
    note: str = ""


@dataclass(frozen=True)
class Device:
    """A device that `simulate` and `offload` know: memory, units in it, the processor beside it, links, energy.

    ``Device.load("neupims")`` takes a shipped one, ``Device.load(path)`` one's own. ``constants[section][name]`` has
    every value with its source; ``sources`` says what those are. ``device.replace("timing.tFAW", 24)`` is a variant.
    """

    name: str
    about: str
    constants: Mapping[str, Mapping[str, Constant]]
    sources: Mapping[str, str] = field(repr=False)

    @classmethod
    def load(cls, name: str | Path) -> Device:
        """A shipped device by its name, or the device in a file.

        Raises:
            DeviceError: for a wrong file; it names the file, the constant, what was expected and what stands there.
        """
        path = Path(name)
        if not path.suffix and path.name == str(name):
            path = SHIPPED / f"{name}.json"
            if not path.is_file():
                raise DeviceError(f"device: expected one of {', '.join(shipped())} or a file, got {str(name)!r}")
        return cls._parse(_read(path, ()), path)

    @classmethod
    def _parse(cls, raw: dict[str, Any], path: Path) -> Device:
        def fail(what: str) -> DeviceError:
            return DeviceError(f"{path}: {what}")

        sources = raw.get("sources", {})
        constants: dict[str, dict[str, Constant]] = {}
        for section, entries in raw.items():
            if section in ("about", "sources"):
                continue
            if section not in SECTIONS:
                raise fail(f"{section}: expected one of {', '.join(SECTIONS)}, got an unknown section")
            for name, entry in entries.items():
                where = f"{section}.{name}"
                if name not in SECTIONS[section]:
                    raise fail(f"{where}: expected one of {', '.join(SECTIONS[section])}, got an unknown constant")
                if (
                    not isinstance(entry, list)
                    or len(entry) not in (2, 3)
                    or not all(isinstance(e, str) for e in entry[1:])
                ):
                    raise fail(f"{where}: expected [value, source] or [value, source, note], got {entry!r}")
                if entry[1] not in sources:
                    raise fail(f"{where}: expected a source among {', '.join(sources) or 'none'}, got {entry[1]!r}")
                if entry[1] == "own" and len(entry) == 2:
                    raise fail(f"{where}: expected a note with the reason of an own choice, got none")
                expected, holds = SECTIONS[section][name]
                if not holds(entry[0]):
                    raise fail(f"{where}: expected {expected}, got {entry[0]!r}")
                constants.setdefault(section, {})[name] = Constant(*entry)
        values = {s: {n: c.value for n, c in entries.items()} for s, entries in constants.items()}
        for problem in missing(values):
            raise fail(problem)
        for section, name, kind in unread(values):
            constant = constants[section].pop(name, None)
            if constant is None or ": " in constant.source:
                continue  # the base is of another kind, and this is true of it alone
            raise fail(
                f"{section}.{name}: expected none: a device with {kind} does not read it, got {constant.value!r}"
            )
        for problem in contradictions(values):
            raise fail(problem)
        constants = {section: entries for section, entries in constants.items() if entries}
        return cls(path.name.removesuffix(".json"), str(raw.get("about", "")), constants, sources)

    def __repr__(self) -> str:
        return f"Device({self.name})"

    def __getitem__(self, key: str) -> Any:
        """``device["timing.tFAW"]``: the value of a constant."""
        section, _, name = key.partition(".")
        try:
            return self.constants[section][name].value
        except KeyError:
            raise KeyError(f"device {self.name}: no constant {key!r}") from None

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a constant, ``default`` where the device has none."""
        section, _, name = key.partition(".")
        constant = self.constants.get(section, {}).get(name)
        return default if constant is None else constant.value

    def replace(self, key: str, value: Any) -> Device:
        """A device that differs in one constant, checked as a file is."""
        section, _, name = key.partition(".")
        self[key]
        raw: dict[str, Any] = {
            s: {n: [c.value, c.source, c.note] for n, c in e.items()} for s, e in self.constants.items()
        }
        raw["sources"], raw["about"] = self.sources, self.about
        raw[section][name] = [value, self.constants[section][name].source, f"was {self[key]}"]
        return Device._parse(raw, Path(f"{self.name},{key}={value}"))

    @cached_property
    def numbers(self) -> dict[str, dict[str, Any]]:
        """Plain values for the simulator, energies of events worked out from currents."""
        values = {
            s: {n: c.value for n, c in e.items()} for s, e in self.constants.items() if s not in ("currents", "energy")
        }
        values["energy"] = self._energy()
        return values

    def _energy(self) -> dict[str, float]:
        """Picojoules of events, a stated one before one from currents."""
        stated = {s: {n: c.value for n, c in e.items()} for s, e in self.constants.items()}
        given = {**events(stated), **stated.get("energy", {})}
        read = given.get("read", 0.0)
        if self.get("pim.kind") == "banks":
            given["comp"] = given.get("comp_times_read", 0.0) * read
            given["gwrite"] = read * self["memory.row_bytes"] / self["memory.access_bytes"]
            given["result"] = read
        given["extra_row_buffer_mw"] = given.get("extra_row_buffer", 0.0) * given.get("background_mw", 0.0)
        for factor in ("comp_times_read", "extra_row_buffer"):
            given.pop(factor, None)
        return given


def _read(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    """The file, over the file that it says is its base."""
    try:
        raw = json.loads(path.read_text())
    except FileNotFoundError:
        raise DeviceError(f"{path}: expected a device file, got nothing") from None
    except (ValueError, OSError) as error:
        raise DeviceError(f"{path}: expected JSON, got {error}") from None
    if not isinstance(raw, dict) or not all(isinstance(v, dict) for k, v in raw.items() if k not in ("about", "base")):
        raise DeviceError(f"{path}: expected an object of sections, got {type(raw).__name__}")
    base = raw.pop("base", None)
    if base is None:
        return raw
    origin = SHIPPED / f"{base}.json" if (SHIPPED / f"{base}.json").is_file() else path.parent / str(base)
    if origin in seen or origin == path:
        raise DeviceError(f"{path}: base: expected another file, got {base!r}, which leads back here")
    merged = copy.deepcopy(_read(origin, (*seen, path)))
    # Sources of the two files are told apart by the file's name.
    stem = origin.stem
    for section, entries in merged.items():
        if section not in ("about", "sources"):
            for entry in entries.values():
                if isinstance(entry, list) and len(entry) > 1 and ": " not in str(entry[1]):
                    entry[1] = f"{stem}: {entry[1]}"
    merged["sources"] = {k if ": " in k else f"{stem}: {k}": v for k, v in merged.get("sources", {}).items()}
    for section, entries in raw.items():
        if isinstance(entries, dict):
            merged.setdefault(section, {}).update(entries)
        else:
            merged[section] = entries
    return merged


def shipped() -> list[str]:
    """Names of the devices that come with effops."""
    return sorted(path.stem for path in SHIPPED.glob("*.json"))
