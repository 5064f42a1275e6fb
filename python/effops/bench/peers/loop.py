"""The loops written for one case alone (``bench/loops`` of the source tree), compiled when they are asked for."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from effops.bench.work import Missing

SOURCE = Path(__file__).resolve().parents[4] / "bench" / "loops" / "decode_bf16.cpp"
FLAGS = ["-O3", "-std=c++20", "-fPIC", "-shared", "-fopenmp", "-march=cooperlake"]


@cache
def _library() -> ctypes.CDLL:
    if not SOURCE.exists():
        raise Missing("bench/loops is not there: it belongs to the source tree")
    compiler = shutil.which("g++")
    if compiler is None:
        raise Missing("g++ is not there")
    if "avx512_bf16" not in Path("/proc/cpuinfo").read_text():
        raise Missing("this processor has no AVX-512-BF16")
    with tempfile.TemporaryDirectory() as directory:
        target = Path(directory) / "decode_bf16.so"
        built = subprocess.run([compiler, *FLAGS, str(SOURCE), "-o", str(target)], capture_output=True, text=True)
        if built.returncode:
            raise Missing(f"decode_bf16.cpp does not compile: {built.stderr.splitlines()[0]}")
        return ctypes.CDLL(str(target))


class DecodeBf16:
    """bfloat16, one query a sequence, 4 query heads a KV head, head dim 128, heads-major memory, L % 4 = 0."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        batch, tokens, heads, dim = q.shape
        length, kv_heads = k.shape[1], k.shape[2]
        if (q.dtype, tokens, heads, dim, length % 4) != (torch.bfloat16, 1, 4 * kv_heads, 128, 0):
            raise Missing("written for bf16 decode, 4 heads a KV head, head dim 128")
        self.call = _library().decode_bf16
        self.q, self.k, self.v = q, k.transpose(1, 2), v.transpose(1, 2)
        if not (self.q.is_contiguous() and self.k.is_contiguous() and self.v.is_contiguous()):
            raise Missing("written for heads-major memory")
        self.out = torch.empty_like(q)
        pointers = [ctypes.c_void_p(t.data_ptr()) for t in (self.q, self.k, self.v, self.out)]
        sizes = [ctypes.c_int64(n) for n in (batch, kv_heads, length, torch.get_num_threads())]
        self.arguments = [*pointers, *sizes]

    def __call__(self) -> Tensor:
        self.call(*self.arguments)
        return self.out
