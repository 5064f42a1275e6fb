"""Bad arguments: one clear line on stderr, exit code 2, and no torch needed to say so."""

from __future__ import annotations

import subprocess
import sys

import pytest
from effops import cli

ATTENTION = ["explain", "attention", "--kv-len", "64", "--heads", "4", "--kv-heads", "2", "--head-dim", "64"]

BAD = {
    "no command": ([], "required: COMMAND"),
    "unknown command": (["train"], "invalid choice: 'train'"),
    "unknown option": (["env", "--colour"], "unrecognized arguments: --colour"),
    "unknown op": (["explain", "convolution"], "invalid choice: 'convolution'"),
    "missing size": (["explain", "attention", "--kv-len", "64"], "required: --heads, --kv-heads, --head-dim"),
    "negative size": ([*ATTENTION, "--window", "-3"], "argument --window: expected"),
    "unknown dtype": ([*ATTENTION, "--dtype", "int8"], "argument --dtype: expected one of f32, bf16, f16, f64, got"),
    "heads that do not divide": ([*ATTENTION, "--kv-heads", "3"], "kv_heads: expected a divisor of heads = 4, got 3"),
    "unknown family": (["bench", "convolution"], "invalid choice: 'convolution'"),
    "unknown peer": (["bench", "linear", "--peer", "sdpa"], "argument --peer: invalid choice: 'sdpa'"),
    "no rounds": (["bench", "linear", "--repeat", "0"], "argument --repeat: expected an integer of 1 or more"),
    "no folder": (
        ["bench", "linear", "--json", "/nowhere/at/all.json"],
        "argument --json: expected a file in a folder",
    ),
    "more queries than keys": (["bench", "attention", "--q-len", "9", "--kv-len", "4"], "--q-len: expected at most"),
    "uneven heads": (["bench", "attention", "--heads", "5", "--kv-heads", "2"], "--kv-heads: expected a divisor of 5"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name, capsys):
    arguments, message = BAD[name]
    try:
        code = cli.main(arguments)
    except SystemExit as stopped:
        code = stopped.code
    captured = capsys.readouterr()
    assert code == 2 and captured.out == ""
    assert len(captured.err.splitlines()) == 1 and message in captured.err
    assert captured.err.startswith("effops")


def test_arguments_are_parsed_without_torch():
    code = (
        "import sys; from effops import cli\n"
        "for name in cli.COMMANDS:\n"
        "    try: cli.parser([name]).parse_args([name, '--no-such-option'])\n"
        "    except SystemExit as stopped: assert stopped.code == 2\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["--help"])
    assert stopped.value.code == 0
    out = capsys.readouterr().out
    assert all(name in out for name in cli.COMMANDS)
