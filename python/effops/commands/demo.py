"""``effops demo``."""

from __future__ import annotations

import argparse

from effops.bench.demo.options import add_arguments

__all__ = ["add_arguments", "run"]


def run(arguments: argparse.Namespace) -> int:
    from effops.bench import demo

    return int(demo.run(arguments))
