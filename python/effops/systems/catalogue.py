"""The published systems by name: ``catalogue.tsv``, one row a system, with its paper and its state."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

SECTIONS = {
    "decoding": "several tokens a step, fewer layers a token",
    "experts": "mixtures of experts, adapters, the machines for them",
    "attention": "long contexts, KV caches, serving, other mixers of a sequence",
    "multitask": "merged models, tasks that share a network, encoders",
}


@dataclass(frozen=True)
class Entry:
    """A published system. ``id`` is its name on the command line and its module's; ``arxiv`` its paper's number."""

    id: str
    name: str
    section: str
    state: str  # built or planned
    arxiv: str
    title: str


@cache
def catalogue() -> tuple[Entry, ...]:
    """Every system, in the order of the sections."""
    lines = Path(__file__).with_name("catalogue.tsv").read_text(encoding="utf-8").splitlines()
    return tuple(Entry(*line.split("\t")) for line in lines[1:])


def built(names: Iterable[str]) -> list[Entry]:
    """The systems of these ids, each of which can run.

    Raises:
        ValueError: no system has this id, or it is planned.
    """
    known = {entry.id: entry for entry in catalogue()}
    found = []
    for name in names:
        entry = known.get(name)
        if entry is None:
            raise ValueError(f"systems: NAME: expected a name that `effops systems` lists, got {name!r}")
        if entry.state != "built":
            ready = ", ".join(other.id for other in known.values() if other.state == "built")
            raise ValueError(f"systems: NAME: expected a built system ({ready}), got {name!r}, which is planned")
        found.append(entry)
    return found
