"""``effops explain`` and ``effops.explain``: the schedule as text."""

from __future__ import annotations

import effops
import pytest
import torch
from effops import _explain, cli, ops
from effops.commands.explain import SIZES

DECODE = {"batch": 8, "q_len": 1, "kv_len": 4096, "heads": 32, "kv_heads": 8, "head_dim": 128}


def lines(text: str) -> dict[str, str]:
    return dict(line.split(": ", 1) for line in text.splitlines())


def test_attention_decode_streams_and_prefill_does_not():
    decode = lines(effops.explain("attention", dtype="bfloat16", **DECODE))
    assert decode["loop"] == "streaming" and decode["rows_per_kv_head"] == "4"
    assert int(decode["kv_bytes"]) == 8 * 8 * 4096 * 256 * 2
    assert int(decode["splits"]) > 1 and int(decode["workspace_bytes"]) > 0
    prefill = lines(effops.explain("attention", dtype="bfloat16", **DECODE | {"q_len": 256}))
    assert prefill["loop"] == "gemm"


def test_the_schedule_of_device_kernels(monkeypatch):
    monkeypatch.setenv("EFFOPS_BACKEND", "simt")
    decode = lines(effops.explain("attention", dtype="bfloat16", **DECODE))
    assert (decode["backend"], decode["loop"], decode["row_block"]) == ("simt", "streaming", "16")
    assert decode["splits"] == "17 at most" and decode["thread_blocks"] == str(8 * 8 * 17)
    assert int(decode["workspace_bytes"]) == 8 * 8 * 17 * 4 * 130 * 4
    many = lines(effops.explain("attention", dtype="bfloat16", **DECODE | {"q_len": 256}))
    assert (many["loop"], many["row_block"], many["splits"]) == ("gemm", "64", "1 at most")
    assert lines(effops.explain("tree_attention", **DECODE | {"q_len": 64}))["loop"] == "scalar"


def test_a_window_visits_fewer_keys():
    full, windowed = (
        int(lines(effops.explain("attention", **DECODE, causal=True, window=window))["flops"]) for window in (0, 256)
    )
    assert 12 * windowed < full


def test_packed_linear_of_few_bits():
    for format, bits, group in (("int4", 4, 16), ("int8", 8, 0), ("fp8_e4m3", 8, 8)):
        packed = ops.pack_weight(torch.randn(70, 48), format, group_size=group or None)
        said = lines(effops.explain("packed_linear", dtype="bfloat16", rows=3, n=70, k=48, bits=bits, group=group))
        assert said["weight_bytes"] == str(packed.nbytes) and said["tasks"] == "3" and f"{bits}-bit" in said["loop"]
    for sizes in ({"bits": 3}, {"bits": 4, "group": 32}, {"bits": 8, "dtype": "float64"}):
        with pytest.raises(ValueError, match=r"explain: (bits|group): expected"):
            effops.explain("packed_linear", **({"dtype": "float32", "n": 70, "k": 48} | sizes))


def test_packed_linear_names_the_path():
    few, many = (lines(effops.explain("packed_linear", dtype="bfloat16", rows=r, n=64, k=32)) for r in (16, 17))
    assert few["loop"] == "streaming" and many["loop"].startswith("torch gemm")
    half = lines(effops.explain("packed_linear", dtype="float16", rows=17, n=64, k=32))
    assert half["loop"] == "streaming"
    assert "torch's own" in few["gradient"]  # the declared path of effops.nn


def test_every_op_is_explained():
    functions = {name for name in ops.__all__ if hasattr(torch.ops.effops, name)}
    assert set(SIZES) == set(_explain._EXPLAINED) == functions
    for op, sizes in SIZES.items():
        found = lines(effops.explain(op, **{name: 4 if x is None else x for name, x in sizes.items()}))
        assert found["op"] == op and found["backend"] == "cpu" and found["gradient"] and found["isa"]


def test_a_layer_of_experts_reads_the_chosen_ones():
    sizes = {"experts": 64, "k": 8, "width": 10, "inner": 3}
    few, many = (lines(effops.explain("fused_experts", rows=n, **sizes)) for n in (2, 100))
    assert (few["experts_read"], many["experts_read"]) == ("16 at most", "64 at most")
    assert int(few["bytes_read"]) == 4 * (2 * 10 + 16 * 90) and int(many["flops"]) == 6 * 800 * 30


def test_counts_of_one_pass_ops():
    found = lines(effops.explain("silu_mul", dtype="float16", rows=3, dim=10))
    assert (found["bytes_read"], found["bytes_written"]) == ("60", "30")


@pytest.mark.parametrize(
    "op, sizes, message",
    [
        ("softmax", {}, "explain: op: expected one of attention"),
        ("rms_norm", {"dim": 4, "dtype": "int8"}, "explain: dtype: expected one of float32"),
        ("rms_norm", {}, "explain: rms_norm: missing a required argument: 'dim'"),
        ("rms_norm", {"dim": 4, "rowz": 1}, "explain: rms_norm: got an unexpected keyword argument 'rowz'"),
        ("rms_norm", {"dim": -4}, "explain: dim: expected an integer of 0 or more, got -4"),
    ],
)
def test_refusals(op, sizes, message):
    with pytest.raises(ValueError, match=message):
        effops.explain(op, **sizes)


def test_command(capsys):
    arguments = [x for name, size in DECODE.items() for x in (f"--{name.replace('_', '-')}", str(size))]
    assert cli.main(["explain", "attention", "--dtype", "bf16", *arguments, "--causal"]) == 0
    assert capsys.readouterr().out.strip() == effops.explain("attention", dtype="bfloat16", causal=True, **DECODE)
