"""The ``effops`` command: env, explain, selftest, bench, demo, pim, systems.

Parsing imports neither torch nor the ops library, so that ``effops env`` and every argument error work without them.
Exit codes: 0 done, 1 something is wrong (a failed check, a missing part), 2 bad arguments.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import NoReturn

COMMANDS = {
    "env": "what is built, loaded and found",
    "explain": "the path and the schedule that an op call of given sizes would take",
    "selftest": "check every op against the reference (under a minute)",
    "bench": "measure against the hardware's limit and against peers",
    "demo": "decode real text with plain torch and with effops, side by side",
    "pim": "a model on devices with processing in memory: time, energy and utilisation beside the baselines",
    "systems": "published systems: which there are, and their claims repeated in small",
}


class Parser(argparse.ArgumentParser):
    """Says what is wrong with the arguments in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def parser(argv: Sequence[str]) -> Parser:
    """The parser; of the commands only the one that ``argv`` names is imported."""
    top = Parser(prog="effops", description="Efficient transformer ops for PyTorch.", allow_abbrev=False)
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=Parser)
    for name, summary in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
        if name in argv:
            module = importlib.import_module(f"effops.commands.{name}")
            module.add_arguments(command)
            command.set_defaults(run=module.run)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    arguments = parser(argv).parse_args(argv)

    def complain(error: object) -> None:
        print(f"effops {arguments.command}: {str(error).removeprefix(f'{arguments.command}: ')}", file=sys.stderr)

    try:
        return int(arguments.run(arguments))
    except ValueError as error:  # a value that parses but does not fit the others
        complain(error)
        return 2
    except (RuntimeError, OSError, ImportError) as error:
        complain(error)
        return 1
    except KeyboardInterrupt:
        complain("interrupted")
        return 130
