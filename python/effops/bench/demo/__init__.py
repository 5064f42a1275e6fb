"""``effops demo``: real text decoded by plain torch and by effops, side by side."""

from __future__ import annotations

import argparse


def run(arguments: argparse.Namespace) -> int:
    """Runs the demo; 0 if every judgement holds, else 1."""
    try:
        import matplotlib  # noqa: F401  (asked for before minutes are spent, not after)
        import rich  # noqa: F401
    except ImportError:
        raise ImportError("effops[demo] is needed: pip install 'effops[demo]'") from None
    from effops.bench.demo.main import run as measure

    return measure(arguments)
