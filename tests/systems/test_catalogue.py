"""The catalogue: 84 systems, each with a paper, a section and a state that is true."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys

import pytest
from effops import cli
from effops.systems import built, catalogue
from effops.systems.catalogue import SECTIONS

COUNTS = {"decoding": 20, "experts": 20, "attention": 18, "multitask": 26}


def test_every_system_is_there_once():
    entries = catalogue()
    assert {s: sum(e.section == s for e in entries) for s in SECTIONS} == COUNTS and len(entries) == 84
    for column in ("id", "name", "arxiv", "title"):
        assert len({getattr(entry, column) for entry in entries}) == 84, column
    for entry in entries:
        assert re.fullmatch(r"[a-z][a-z0-9_]*", entry.id) and re.fullmatch(r"\d{4}\.\d{5}", entry.arxiv)
        assert entry.state in ("built", "planned")


@pytest.mark.parametrize("entry", [e for e in catalogue() if e.state == "built"], ids=lambda e: e.id)
def test_built_systems_run(entry):
    module = importlib.import_module(f"effops.systems.{entry.id}")
    assert callable(module.run) and entry.arxiv in module.__doc__


def test_names():
    assert [entry.name for entry in built(["double_sparsity"])] == ["Double Sparsity"]
    with pytest.raises(
        ValueError, match=r"NAME: expected a built system \(.*double_sparsity.*\), got 'medusa', which is planned"
    ):
        built(["double_sparsity", "medusa"])
    with pytest.raises(ValueError, match="NAME: expected a name that `effops systems` lists, got 'medussa'"):
        built(["medussa"])


PLANNED = next(entry.id for entry in catalogue() if entry.state == "planned")


@pytest.mark.parametrize("name, says", [(PLANNED, "which is planned"), ("duo-attention", "`effops systems` lists")])
def test_a_name_that_cannot_run_is_one_line(name, says, capsys):
    assert cli.main(["systems", "run", "double_sparsity", name]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and len(captured.err.splitlines()) == 1 and says in captured.err


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["run"], "required: NAME"),
        (["walk"], "invalid choice: 'walk'"),
        (["run", "double_sparsity", "--json", "/nowhere/at/all.json"], "argument --json: expected a file in a folder"),
        (["run", "double_sparsity", "--model", "/nowhere"], "argument --model: expected an existing directory"),
    ],
)
def test_bad_arguments(arguments, says, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["systems", *arguments])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and len(error.splitlines()) == 1 and says in error


def test_the_list_needs_no_torch():
    code = "import sys; sys.modules['torch'] = None; from effops.cli import main; sys.exit(main(['systems']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    for entry in catalogue():
        (line,) = (line for line in lines if line.split()[:1] == [entry.id])
        assert line.split(maxsplit=3)[1:] == [entry.state, entry.arxiv, entry.title]
    assert all(any(line.startswith(f"{section}: ") for line in lines) for section in SECTIONS)


@pytest.mark.parametrize("module, extra", [("rich", "demo"), ("matplotlib", "demo"), ("tokenizers", "models")])
def test_a_missing_extra_is_one_line(module, extra):
    code = (
        f"import sys; sys.modules[{module!r}] = None; from effops.cli import main\n"
        "sys.exit(main(['systems', 'run', 'double_sparsity']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == f"effops systems: effops[{extra}] is needed: pip install 'effops[{extra}]'\n"
