"""``effops systems``: the published systems, and runs of those that are built."""

from __future__ import annotations

import argparse
from pathlib import Path

from effops.commands.bench import output


def directory(text: str) -> Path:
    """A directory that exists."""
    path = Path(text)
    if not path.is_dir():
        raise argparse.ArgumentTypeError(f"expected an existing directory, got {text!r}")
    return path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", description="without one: lists the systems")
    one = actions.add_parser("run", help="repeat a paper's claim in small: tables, a verdict, a drawing")
    one.add_argument("names", nargs="+", metavar="NAME", help="built systems, as `effops systems` lists them")
    one.add_argument("--json", type=output, metavar="FILE", help="write the figures as JSON")
    one.add_argument("--plot", type=output, metavar="FILE", help="write the curves (png, svg or pdf)")
    one.add_argument(
        "--model", type=directory, metavar="DIR", help="Hugging Face directory (default: the shipped code model)"
    )
    one.add_argument("--retrain", action="store_true", help="train and calibrate again, whatever was kept")


def run(arguments: argparse.Namespace) -> int:
    from effops.systems import built

    if arguments.action is None:
        return _list()
    entries = built(dict.fromkeys(arguments.names))  # a wrong name is said before anything is loaded
    from effops import _library

    _library.require()
    try:
        import matplotlib  # noqa: F401  (asked for before minutes are spent, not after)
        import rich  # noqa: F401
    except ImportError:
        raise ImportError("effops[demo] is needed: pip install 'effops[demo]'") from None
    from effops.systems.runner import run as run_systems

    return run_systems(entries, arguments)


def _list() -> int:
    from effops.systems.catalogue import SECTIONS, catalogue

    entries = catalogue()
    width = max(len(entry.id) for entry in entries)
    for section, about in SECTIONS.items():
        print(f"{section}: {about}")
        for entry in entries:
            if entry.section == section:
                print(f"  {entry.id:<{width}}  {entry.state:<7}  {entry.arxiv}  {entry.title}")
        print()
    count = sum(entry.state == "built" for entry in entries)
    print(f"{count} of {len(entries)} are built; run one with: effops systems run NAME")
    return 0
