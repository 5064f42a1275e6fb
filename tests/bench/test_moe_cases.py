"""What the cases of experts count, and that their checks tell right from wrong."""

from __future__ import annotations

import json

import pytest
import torch
from effops import _host, cli
from effops.bench import moe

SMALL = moe.Case("bfloat16", experts=6, k=2, dim=64, hidden=48, tokens=5)
FLOAT = moe.Case("float32", experts=4, k=3, dim=40, hidden=24, tokens=1)


def test_counts():
    """The bytes of the experts that are chosen, of x and the result, and of what the router says."""
    work = moe.work(SMALL, ())
    active = work.fields["active_experts"]
    assert 2 <= active <= 6
    assert work.bytes == round(active * 3 * 64 * 48 * 2) + 2 * 5 * 64 * 2 + 5 * 2 * 8
    assert work.flops == 5 * 2 * 3 * 2 * 64 * 48
    assert moe.work(FLOAT, ()).fields["active_experts"] == 3
    int8 = work.others["effops-int8"]
    assert int8.bytes == round(active * (3 * 64 * 48 + 4 * (96 + 64))) + 2 * 5 * 64 * 2 + 5 * 2 * 8
    assert int8.flops == work.flops


@pytest.mark.parametrize("case", [SMALL, FLOAT], ids=["bfloat16", "float32"])
def test_every_form_is_right(case):
    work = moe.work(case, ("grouped_mm", "loop"))
    assert set(work.candidates) == {"effops", "effops-plain", "effops-int8", "grouped_mm", "loop"}
    for name, call in work.candidates.items():
        assert work.check(name, call(0)) <= 1, name
        assert any(not torch.equal(call(0), call(copy)) for copy in range(1, work.copies)), name


def test_the_check_sees_small_mistakes():
    work = moe.work(SMALL, ())
    for name in ("effops", "effops-int8", "loop"):
        right = work.candidates["effops-int8" if name == "effops-int8" else "effops"](0)
        assert work.check(name, right) <= 1
        assert work.check(name, 1.1 * right) > 1
        assert work.check(name, right[:, :-1]) == torch.inf
        for corner in ((0, 0), (-1, -1)):
            spoilt = right.clone()
            spoilt[corner] += 1
            assert work.check(name, spoilt) > 1
    work = moe.work(FLOAT, ())
    assert work.check("effops", work.candidates["effops-int8"](0)) > 1  # other weights


def test_default_cases_cover_what_performance_marks_name():
    cases = list(moe.default_cases())
    assert {c.tokens for c in cases} == {1, 8, 32, 512, 2048}
    layers = [{(c.experts, c.dim, c.hidden, c.k) for c in cases if c.dtype == d} for d in ("bfloat16", "float32")]
    layers = layers if _host.cpu_isa() == "avx512bf16" else layers[::-1]
    assert layers == [set(moe.LAYERS.values()), {moe.LAYERS["OLMoE"]}]


def test_the_command_takes_one_case(tiny, tmp_path):
    path = tmp_path / "moe.json"
    sizes = ["--experts", "4", "--k", "2", "--dim", "32", "--hidden", "16", "--tokens", "3"]
    arguments = ["bench", "moe", "--quick", *sizes, "--dtype", "f32", "--peer", "loop", "--repeat", "2"]
    assert cli.main([*arguments, "--json", str(path)]) == 0
    (row,) = json.loads(path.read_text())["rows"]
    assert (row["experts"], row["k"], row["tokens"], row["dtype"]) == (4, 2, 3, "float32")
    assert set(row["results"]) == {"effops", "effops-plain", "effops-int8", "loop"}


def test_sizes_that_do_not_fit_are_refused(capsys):
    assert cli.main(["bench", "moe", "--experts", "4", "--k", "5"]) == 2
    assert "--k: expected at most 4 (--experts), got 5" in capsys.readouterr().err
