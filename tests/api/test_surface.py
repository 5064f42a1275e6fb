"""The public surface changes on purpose only."""

from __future__ import annotations

import difflib
from pathlib import Path

from surface import surface

RECORDED = Path(__file__).with_name("surface.txt")


def test_surface_is_as_recorded():
    difference = list(
        difflib.unified_diff(RECORDED.read_text().splitlines(), list(surface()), "recorded", "now", lineterm="", n=0)
    )
    update = "a wanted change is recorded by: python tests/api/surface.py > tests/api/surface.txt"
    assert not difference, "\n".join(["the public surface has changed:", *difference, update])
