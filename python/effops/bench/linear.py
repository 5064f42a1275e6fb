"""Linear layers of few rows against the floor and against peers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from effops import ops
from effops.bench.peers import llama_cpp
from effops.bench.roof import last_level_cache_bytes
from effops.bench.work import Call, Missing, Other, Work
from effops.reference.bounds import Interval, packed_linear_bound

PACKED: dict[str, dict[str, Any]] = {
    "int8": {}, "int8-g32": {"group_size": 32}, "int4": {}, "int4-g32": {"group_size": 32},
}  # fmt: skip
ROUNDED = {"int8-a8": "int8-g32", "int4-a8": "int4-g32"}  # these weights, and x in int8 as llama.cpp has it
OWN = ("effops", *PACKED, *ROUNDED)
BLOCKS = {f"llama.cpp {name}": name for name in llama_cpp.QUANTISED}
PEERS = ("torch", "torch-f32", "llama.cpp", *BLOCKS)
CHECKED = 256  # output features that the check looks at, half from either end


@dataclass(frozen=True)
class Case:
    """x [rows, k] times the transposed weight [n, k]."""

    dtype: str = "bfloat16"
    rows: int = 1
    n: int = 4096
    k: int = 11008

    @property
    def name(self) -> str:
        return f"{self.rows} row{'s' * (self.rows > 1)} × [{self.n}, {self.k}] {self.dtype}"


def default_cases(dtypes: tuple[str, ...] = ("bfloat16", "float32")) -> Iterator[Case]:
    """4096 × 11008 with 1, 4 and 8 rows; two smaller weights with 1 and 8; then the four weights of an 8B-class decoder
    layer with one row."""
    for dtype in dtypes:
        for rows in (1, 4, 8):
            yield Case(dtype, rows)
    for n, k in ((4096, 4096), (2048, 5632)):
        for rows in (1, 8):
            yield Case(dtypes[0], rows, n, k)
    for n, k in ((6144, 4096), (28672, 4096), (4096, 14336)):
        yield Case(dtypes[0], n=n, k=k)


def quick_cases(dtypes: tuple[str, ...] = ("bfloat16", "float32")) -> Iterator[Case]:
    for dtype in dtypes:
        for rows in (1, 8):
            yield Case(dtype, rows, n=512, k=1024)


def work(case: Case, peers: tuple[str, ...]) -> Work:
    """The weight of a case, copied often enough to outgrow the caches, and everyone who multiplies with it; beside them
    the same weight in few bits, as :func:`effops.ops.pack_weight` packs it by default and in groups of 32; and in
    llama.cpp's blocks, whose product quantises x to int8 as well, as ours does where it is asked to."""
    dtype = getattr(torch, case.dtype)
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(rows, case.k, generator=generator).to(dtype) for rows in (case.rows, case.n))
    packed = {name: _pack(weight, name) for name in PACKED}
    blocks = _blocks(weight, peers)
    enough = {name: _copies(w.nbytes) for name, w in ({"effops": weight} | packed).items()}
    weights = [weight, *(weight.clone() for _ in range(enough["effops"] - 1))]
    copies = max(enough.values())
    forms: dict[str, Callable[[], Call | str]] = {
        "effops": lambda: lambda i: ops.packed_linear(x, weights[i % len(weights)]),
        **{name: partial(_packed, x, w, enough[name]) for name, w in packed.items()},
        **{name: partial(_packed, x, packed[form], enough[form], "int8") for name, form in ROUNDED.items()},
        "torch": lambda: lambda i: F.linear(x, weights[i % len(weights)]),
        "torch-f32": lambda: _torch_f32(x, weights),
        "llama.cpp": lambda: _llama_cpp(x, weights),
        **{name: partial(_llama_blocks, x, blocks[name]) for name in blocks},
    }
    few_bits: dict[str, ops.PackedWeight | llama_cpp.Blocks] = {
        **packed,
        **{n: w for n, w in blocks.items() if not isinstance(w, str)},
    }
    ends, flops = x.nbytes + case.rows * case.n * dtype.itemsize, 2 * case.rows * case.n * case.k
    return Work(
        name=case.name,
        fields=asdict(case),
        dtype=dtype,
        bytes=weight.nbytes + ends,
        flops=flops,
        copies=copies,
        candidates={name: forms[name]() for name in (*OWN, *peers)},
        check=_checker(x, weight, few_bits),
        others={
            **{n: Other(_form(w), w.nbytes + ends, flops) for n, w in few_bits.items()},
            **{n: Other(f"{_form(packed[f])}, x in int8", packed[f].nbytes + ends, flops) for n, f in ROUNDED.items()},
        },
    )


def _pack(weight: Tensor, name: str) -> ops.PackedWeight:
    return ops.pack_weight(weight, name.split("-")[0], **PACKED[name])


def _blocks(weight: Tensor, peers: tuple[str, ...]) -> dict[str, llama_cpp.Blocks | str]:
    """The weight in each of llama.cpp's formats, or why there is none."""
    found: dict[str, llama_cpp.Blocks | str] = {}
    for name, format in BLOCKS.items():
        if name not in peers:
            continue
        try:
            found[name] = llama_cpp.Blocks(weight, format)
        except Missing as missing:
            found[name] = str(missing)
    return found


def _form(weight: ops.PackedWeight | llama_cpp.Blocks) -> str:
    if isinstance(weight, ops.PackedWeight):
        return f"a weight of {weight.bits} bits in groups of {weight.group_size}"
    return f"a weight in {weight.format}, x in int8"


def _copies(nbytes: int) -> int:
    return max(1, -(-4 * last_level_cache_bytes() // max(1, nbytes)))


def _packed(x: Tensor, weight: ops.PackedWeight, copies: int, activation: str | None = None) -> Call:
    def copy() -> ops.PackedWeight:
        return replace(weight, data=weight.data.clone())

    weights = [weight, *(copy() for _ in range(copies - 1))]
    return lambda i: ops.packed_linear(x, weights[i % copies], activation=activation)


def _torch_f32(x: Tensor, weights: list[Tensor]) -> Call | str:
    """The same values held in float32: twice the bytes."""
    if x.dtype == torch.float32:
        return "the weights are float32 already"
    wide, wide_weights = x.float(), [w.float() for w in weights]
    return lambda i: F.linear(wide, wide_weights[i % len(weights)])


def _llama_cpp(x: Tensor, weights: list[Tensor]) -> Call | str:
    try:
        calls = [llama_cpp.Linear(x, w) for w in weights]
    except Missing as missing:
        return str(missing)
    return lambda i: calls[i % len(calls)]()


def _llama_blocks(x: Tensor, weight: llama_cpp.Blocks | str) -> Call | str:
    if isinstance(weight, str):
        return weight
    calls = [llama_cpp.Linear(x, weight) for _ in range(_copies(weight.nbytes))]
    return lambda i: calls[i % len(calls)]()


def _checker(
    x: Tensor, weight: Tensor, few_bits: dict[str, ops.PackedWeight | llama_cpp.Blocks]
) -> Callable[[str, Tensor], float]:
    rows = torch.arange(weight.shape[0])
    if len(rows) > CHECKED:
        rows = torch.cat([rows[: CHECKED // 2], rows[-CHECKED // 2 :]])
    exact = {"": packed_linear_bound(x, weight[rows])}
    for name, form in few_bits.items():
        if isinstance(form, ops.PackedWeight):  # features are packed apart
            exact[name] = packed_linear_bound(x, _pack(weight[rows], name))
        else:
            exact[name] = _with_int8_rows(x, form.dequantize()[rows], llama_cpp.ACTIVATIONS[form.format])
    for name, plain in ROUNDED.items():
        exact[name] = packed_linear_bound(x, _pack(weight[rows], plain), activation="int8")

    def check(name: str, out: Tensor) -> float:
        if out.shape != (x.shape[0], weight.shape[0]):
            return torch.inf
        return exact.get(name, exact[""]).worst(out[:, rows])

    return check


def _with_int8_rows(x: Tensor, weight: Tensor, block: int) -> Interval:
    """The bound where blocks of x are rounded to 127 steps of their largest size, which may itself be a float16."""
    exact = packed_linear_bound(x.float(), weight)
    largest = x.double().unflatten(1, (-1, block)).abs().amax(2).repeat_interleave(block, 1)
    off = largest * (0.5 / 127 + 2.0**-10)
    return exact._replace(error=exact.error + off @ weight.double().abs().mT)
