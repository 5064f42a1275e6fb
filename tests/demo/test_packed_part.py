"""The demo's part on weights in few bits: a row for each format, and what it calls a fault."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from effops.bench.demo import packed
from effops.bench.demo.prompts import Prompt
from effops.bench.demo.table import _packed
from effops.models import Tokenizer
from effops.models.shipped import model_dir

pytest.importorskip("rich")


@pytest.fixture(scope="module")
def rows() -> list[packed.PackedRow]:
    tokenizer = Tokenizer.from_pretrained(model_dir())
    prompt = Prompt("a.py", tokenizer.encode("import os\n\n\ndef main():\n    return os"))
    torch.set_num_threads(1)
    return list(packed.measure(tokenizer, [prompt], 4, 1, True, lambda doing: None))


def test_every_format_of_both_models(rows):
    scaled = [name for name in packed.FORMATS if "scaled" in name]
    assert [(r.model, r.format) for r in rows] == [
        (model, format) for model in packed.MODELS for format in packed.FORMATS
        if model == "code-7m" or format not in scaled
    ]  # fmt: skip
    for row in rows:
        plain = next(r for r in rows if r.model == row.model)
        assert row.rate > 0 and len(row.seconds) == 1 and row.as_json()["tokens_per_second"] == row.rate
        assert row.format == packed.PLAIN or row.linear_bytes < 0.26 * plain.linear_bytes
        assert abs(row.above - (row.loss - plain.loss)) < 1e-9 and abs(row.above) < 0.5
    assert _packed(rows).row_count == len(rows)


def test_faults(rows):
    assert not packed.problems([replace(r, above=0.0) for r in rows])
    worse = [replace(r, above=0.3, deviation=0.0) for r in rows if r.format != packed.PLAIN]
    assert len(packed.problems(worse)) == len(worse)
    assert packed.problems([replace(rows[1], above=float("nan"))])
