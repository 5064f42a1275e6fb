"""``effops pim``: a model on a device with processing in memory beside its baselines: time, energy, utilisation."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from effops.commands.bench import output

if TYPE_CHECKING:
    from effops.pim.workload import Workload


def sizes(text: str) -> list[int]:
    """Positive integers, separated by commas."""
    try:
        values = [int(part) for part in text.split(",")]
    except ValueError:
        values = []
    if not values or min(values) < 1:
        raise argparse.ArgumentTypeError(f"expected positive integers separated by commas, got {text!r}")
    return values


def positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not value > 0:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")
    return value


def count(text: str) -> int:
    (value, *more) = sizes(text)
    if more:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text!r}")
    return value


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", description="without one: simulates")
    one = actions.add_parser("validate", help="check a device file")
    one.add_argument("file", metavar="FILE", help="a device file, or a shipped device's name")
    parser.add_argument("--model", metavar="CONFIG", help="config.json, its directory, or a shipped model's name")
    parser.add_argument("--device", default="neupims", metavar="DEVICE", help="a shipped device or a file (neupims)")
    work = parser.add_mutually_exclusive_group()
    work.add_argument("--trace", type=Path, metavar="FILE", help="requests: CSV, TSV or JSON lines")
    work.add_argument(
        "--synthetic", default="sharegpt", metavar="WHAT", help="sharegpt, alpaca or PROMPT+OUTPUT tokens (sharegpt)"
    )
    parser.add_argument("--requests", type=count, metavar="N", help="of a synthetic workload (1000)")
    parser.add_argument(
        "--per-second", type=positive, metavar="RATE", help="its arrivals; without it all are there at once"
    )
    parser.add_argument("--batch", type=count, default=256, metavar="N", help="requests at once at most (256)")
    parser.add_argument("--no-prefill", action="store_true", help="prompts are prefilled elsewhere")
    for name, of in (
        ("tensor", "a layer is split"),
        ("pipeline", "layers are spread"),
        ("data", "requests are spread"),
    ):
        parser.add_argument(f"--{name}", type=count, default=1, metavar="N", help=f"devices over which {of} (1)")
    parser.add_argument("--batches", type=sizes, default=[32, 64, 128, 256, 512], metavar="N,..", help="of the sweep")
    parser.add_argument(
        "--lengths", type=sizes, default=[128, 256, 512, 1024, 2048], metavar="N,..", help="of the sweep"
    )
    parser.add_argument("--seed", type=int, default=0, help="of synthetic workloads and routing (0)")
    parser.add_argument("--json", type=output, metavar="FILE", help="write every figure as JSON")
    parser.add_argument("--plot", type=output, metavar="FILE", help="draw the sweep (png, svg or pdf)")


def run(arguments: argparse.Namespace) -> int:
    if arguments.action == "validate":
        return _validate(arguments.file)
    if arguments.model is None:
        raise ValueError("--model: expected a config.json, its directory or a shipped model's name, got nothing")
    return _simulate(arguments)


def _validate(file: str) -> int:
    from effops.pim import Device

    device = Device.load(file)
    print(f"{device.name}: {device.about}")
    for section, entries in device.constants.items():
        for name, constant in entries.items():
            note = f" ({constant.note})" if constant.note else ""
            print(f"  {section}.{name} = {constant.value}  {constant.source}{note}")
    print("sources:")
    for key, source in device.sources.items():
        print(f"  {key}: {source}")
    return 0


def _simulate(arguments: argparse.Namespace) -> int:
    import json

    from effops.pim import ModelShape, report
    from effops.pim.lineup import lineup

    try:
        from rich.console import Console
        from rich.progress import Progress
    except ImportError:
        raise ImportError("effops[demo] is needed: pip install 'effops[demo]'") from None
    model = ModelShape.load(arguments.model)
    contenders = lineup(arguments.device)
    workload = _workload(arguments)
    split = {"tensor": arguments.tensor, "pipeline": arguments.pipeline, "data": arguments.data}
    running = report.systems(model, contenders, split)
    console = Console()
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("", total=1.0)

        def progress(doing: str, share: float) -> None:
            bar.update(task, description=doing, completed=share)

        results = report.served(
            running, contenders, workload, progress,
            max_batch=arguments.batch, prefill=not arguments.no_prefill, seed=arguments.seed,
        )  # fmt: skip
        rows = report.swept(running, contenders, arguments.batches, arguments.lengths, progress)
    title = f"{arguments.model}, {len(workload)} requests of {workload.name}, {arguments.batch} at once at most"
    report.print_tables(console, results, title)
    if arguments.json:
        from effops.bench import record

        written: dict[str, Any] = {
            **record.context(record.command()),
            "model": model.numbers(),
            "workload": {"name": workload.name, "requests": len(workload)},
            "served": {name: report.figures(r) for name, r in results.items()},
            "sweep": rows,
        }
        arguments.json.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
    if arguments.plot:
        try:
            import matplotlib  # noqa: F401
        except ImportError:
            raise ImportError("effops[demo] is needed: pip install 'effops[demo]'") from None
        devices = arguments.tensor * arguments.pipeline * arguments.data
        report.write_plot(arguments.plot, rows, f"decoding with {arguments.model} on {devices} device(s)")
    return 0


def _workload(arguments: argparse.Namespace) -> Workload:
    from effops.pim.workload import Workload

    if arguments.trace is not None:
        for name, value in (("--requests", arguments.requests), ("--per-second", arguments.per_second)):
            if value is not None:
                raise ValueError(f"{name}: expected none beside --trace, which says its own, got {value}")
        return Workload.file(arguments.trace)
    requests = arguments.requests or 1000
    prompt, plus, answer = arguments.synthetic.partition("+")
    if plus and prompt.isdecimal() and answer.isdecimal():
        lengths = int(prompt), int(answer)
        if min(lengths) < 1:
            expected = "PROMPT+OUTPUT of 1 or more tokens each"
            raise ValueError(f"--synthetic: expected {expected}, got {arguments.synthetic!r}")
        work = Workload.gaussian(*lengths, requests, seed=arguments.seed)
    else:
        work = Workload.named(arguments.synthetic, requests, seed=arguments.seed)
    return work.poisson(arguments.per_second, seed=arguments.seed) if arguments.per_second else work
