"""ggml's mul_mat, the linear layer of llama.cpp, called through its C interface.

The libraries come from an installed llama-cpp-python (found without importing it) or from EFFOPS_LLAMA_CPP, a directory
that holds libggml-base.so and libggml-cpu.so. Weights keep their type; activations and results are float32, as there.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
from ctypes import c_bool, c_int, c_int64, c_size_t, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from effops.bench.work import Missing

TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 30}  # enum ggml_type
SLACK = 1 << 20  # of a context, for headers of tensors and the graph


class InitParams(ctypes.Structure):
    """struct ggml_init_params."""

    _fields_ = [("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool)]


class Plan(ctypes.Structure):
    """struct ggml_cplan; newer versions append fields, for which there is room."""

    _fields_ = [
        ("work_size", c_size_t), ("work_data", c_void_p), ("n_threads", c_int), ("threadpool", c_void_p),
        ("abort_callback", c_void_p), ("abort_callback_data", c_void_p), ("newer", c_int64 * 8),
    ]  # fmt: skip


SIGNATURES = {  # name: (result, arguments)
    "ggml_init": (c_void_p, [InitParams]),
    "ggml_free": (None, [c_void_p]),
    "ggml_new_tensor_2d": (c_void_p, [c_void_p, c_int, c_int64, c_int64]),
    "ggml_get_data": (c_void_p, [c_void_p]),
    "ggml_mul_mat": (c_void_p, [c_void_p, c_void_p, c_void_p]),
    "ggml_new_graph": (c_void_p, [c_void_p]),
    "ggml_build_forward_expand": (None, [c_void_p, c_void_p]),
    "ggml_graph_plan": (Plan, [c_void_p, c_int, c_void_p]),
    "ggml_graph_compute": (c_int, [c_void_p, ctypes.POINTER(Plan)]),
}


def _directory() -> Path:
    forced = os.environ.get("EFFOPS_LLAMA_CPP")
    if forced:
        return Path(forced)
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or not spec.origin:
        raise Missing("llama-cpp-python is not installed, and EFFOPS_LLAMA_CPP is not set")
    return Path(spec.origin).parent / "lib"


@cache
def _functions() -> dict[str, Any]:
    found = {}
    try:
        libraries = [
            ctypes.CDLL(str(_directory() / name), ctypes.RTLD_GLOBAL) for name in ("libggml-base.so", "libggml-cpu.so")
        ]
        for name, (result, arguments) in SIGNATURES.items():
            function = next(getattr(library, name) for library in libraries if hasattr(library, name))
            function.restype, function.argtypes = result, arguments
            found[name] = function
    except (OSError, StopIteration) as error:
        raise Missing(f"ggml cannot be loaded: {error}") from None
    return found


class Linear:
    """x [rows,K] times one weight [N,K], both copied once into a context of ggml's; [rows,N] in x's dtype."""

    def __init__(self, x: Tensor, weight: Tensor) -> None:
        if weight.dtype not in TYPES:
            raise Missing(f"it has no {weight.dtype}")
        ggml = _functions()
        (rows, features), outputs = x.shape, weight.shape[0]
        bytes_ = weight.nbytes + 4 * rows * (features + outputs) + SLACK
        self.context = ggml["ggml_init"](InitParams(bytes_, None, False))
        matrix = ggml["ggml_new_tensor_2d"](self.context, TYPES[weight.dtype], features, outputs)
        vectors = ggml["ggml_new_tensor_2d"](self.context, TYPES[torch.float32], features, rows)
        product = ggml["ggml_mul_mat"](self.context, matrix, vectors)
        wide = x.float().contiguous()
        ctypes.memmove(ggml["ggml_get_data"](matrix), weight.contiguous().data_ptr(), weight.nbytes)
        ctypes.memmove(ggml["ggml_get_data"](vectors), wide.data_ptr(), wide.nbytes)
        self.graph = ggml["ggml_new_graph"](self.context)
        ggml["ggml_build_forward_expand"](self.graph, product)
        self.plan = ggml["ggml_graph_plan"](self.graph, torch.get_num_threads(), None)
        self.work = torch.empty(max(1, self.plan.work_size), dtype=torch.uint8)
        self.plan.work_data = self.work.data_ptr()
        memory = (ctypes.c_float * (rows * outputs)).from_address(ggml["ggml_get_data"](product))
        self.out = torch.frombuffer(memory, dtype=torch.float32).view(rows, outputs)
        self.compute, self.free = ggml["ggml_graph_compute"], ggml["ggml_free"]

    def __call__(self) -> Tensor:
        status = self.compute(self.graph, ctypes.byref(self.plan))
        if status:
            raise RuntimeError(f"ggml_graph_compute: status {status}")
        return self.out

    def __del__(self) -> None:
        if hasattr(self, "free"):
            self.free(self.context)
