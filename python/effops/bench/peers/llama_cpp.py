"""ggml's mul_mat, the linear layer of llama.cpp, called through its C interface.

The libraries come from an installed llama-cpp-python (found without importing it) or from EFFOPS_LLAMA_CPP, a directory
that holds libggml-base.so and libggml-cpu.so. Weights keep their type, or have one of its block formats, in the order
that its CPU backend prefers; activations and results are float32, as there.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
from ctypes import c_bool, c_char_p, c_int, c_int64, c_size_t, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from effops import _host
from effops.bench.work import Missing

TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 30}  # enum ggml_type
QUANTISED = {"Q8_0": 8, "Q4_0": 2, "Q4_K": 12}
REORDERED = ("Q4_0", "Q4_K")  # that its CPU backend has an order of its own for, on x86 from AVX2 on
ACTIVATIONS = {"Q8_0": 32, "Q4_0": 32, "Q4_K": 256}  # that share a step: ggml quantises them to int8
SLACK = 1 << 20  # of a context, for headers of tensors and the graph


class InitParams(ctypes.Structure):
    """struct ggml_init_params."""

    _fields_ = [("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool)]


class Traits(ctypes.Structure):
    """struct ggml_type_traits."""

    _fields_ = [
        ("name", c_char_p), ("block", c_int64), ("block_interleaved", c_int64), ("size", c_size_t),
        ("is_quantized", c_bool), ("to_float", ctypes.CFUNCTYPE(None, c_void_p, c_void_p, c_int64)),
    ]  # fmt: skip


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
    "ggml_row_size": (c_size_t, [c_int, c_int64]),
    "ggml_quantize_chunk": (c_size_t, [c_int, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p]),
    "ggml_get_type_traits": (ctypes.POINTER(Traits), [c_int]),
    "ggml_backend_cpu_reg": (c_void_p, []),
    "ggml_backend_reg_dev_get": (c_void_p, [c_void_p, c_size_t]),
    "ggml_backend_reg_get_proc_address": (c_void_p, [c_void_p, c_char_p]),
    "ggml_backend_cpu_buffer_type": (c_void_p, []),
    "ggml_backend_alloc_ctx_tensors_from_buft": (c_void_p, [c_void_p, c_void_p]),
    "ggml_backend_tensor_set": (None, [c_void_p, c_void_p, c_size_t, c_size_t]),
    "ggml_backend_buffer_free": (None, [c_void_p]),
    "ggml_log_set": (None, [c_void_p, c_void_p]),
}


_LogCallback = ctypes.CFUNCTYPE(None, c_int, c_char_p, c_void_p)
_SILENCE = _LogCallback(lambda level, text, data: None)  # it tells of every weight that it reorders


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
        found["ggml_log_set"](_SILENCE, None)
    except (OSError, StopIteration) as error:
        raise Missing(f"ggml cannot be loaded: {error}") from None
    return found


class Blocks:
    """A weight [N,K] in one of ggml's block formats."""

    def __init__(self, weight: Tensor, format: str) -> None:
        ggml = _functions()
        self.type, self.format, self.shape = QUANTISED[format], format, weight.shape
        rows, features = weight.shape
        row = ggml["ggml_row_size"](self.type, features)
        wide = weight.float().contiguous()
        self.data = torch.empty(rows * row, dtype=torch.uint8)
        ggml["ggml_quantize_chunk"](self.type, wide.data_ptr(), self.data.data_ptr(), 0, rows, features, None)

    @property
    def nbytes(self) -> int:
        return self.data.nbytes

    def dequantize(self) -> Tensor:
        """The weight as the product sees it, float32."""
        out = torch.empty(self.shape)
        traits = _functions()["ggml_get_type_traits"](self.type).contents
        traits.to_float(self.data.data_ptr(), out.data_ptr(), out.numel())
        return out


@cache
def _own_orders() -> list[int]:
    """Buffer types of the CPU backend whose order of a weight it prefers."""
    ggml = _functions()
    register = ggml["ggml_backend_cpu_reg"]()
    address = ggml["ggml_backend_reg_get_proc_address"](register, b"ggml_backend_dev_get_extra_bufts")
    if not address:
        return []
    listed = ctypes.CFUNCTYPE(ctypes.POINTER(c_void_p), c_void_p)(address)
    found: list[int] = []
    each = listed(ggml["ggml_backend_reg_dev_get"](register, 0))
    while each and each[len(found)]:
        found.append(each[len(found)])
    return found


class Linear:
    """x [rows,K] times one weight [N,K], both copied once into memory of ggml's; [rows,N] in x's dtype."""

    def __init__(self, x: Tensor, weight: Tensor | Blocks) -> None:
        reordered = isinstance(weight, Blocks) and weight.format in REORDERED and _host.cpu_isa() != "portable"
        if isinstance(weight, Tensor) and weight.dtype not in TYPES:
            raise Missing(f"it has no {weight.dtype}")
        ggml = _functions()
        (rows, features), outputs = x.shape, weight.shape[0]
        self.context = ggml["ggml_init"](InitParams(4 * rows * (features + outputs) + SLACK, None, False))
        vectors = ggml["ggml_new_tensor_2d"](self.context, TYPES[torch.float32], features, rows)
        self.matrices = ggml["ggml_init"](InitParams(SLACK, None, True))  # without memory of their own
        kind = weight.type if isinstance(weight, Blocks) else TYPES[weight.dtype]
        matrix = ggml["ggml_new_tensor_2d"](self.matrices, kind, features, outputs)
        data = weight.data if isinstance(weight, Blocks) else weight.contiguous()
        self.buffer = self._fill(matrix, data, _own_orders() if reordered else [])
        product = ggml["ggml_mul_mat"](self.context, matrix, vectors)
        wide = x.float().contiguous()
        ctypes.memmove(ggml["ggml_get_data"](vectors), wide.data_ptr(), wide.nbytes)
        self.graph = ggml["ggml_new_graph"](self.context)
        ggml["ggml_build_forward_expand"](self.graph, product)
        self.plan = ggml["ggml_graph_plan"](self.graph, torch.get_num_threads(), None)
        self.work = torch.empty(max(1, self.plan.work_size), dtype=torch.uint8)
        self.plan.work_data = self.work.data_ptr()
        memory = (ctypes.c_float * (rows * outputs)).from_address(ggml["ggml_get_data"](product))
        self.out = torch.frombuffer(memory, dtype=torch.float32).view(rows, outputs)
        self.compute, self.free = ggml["ggml_graph_compute"], ggml["ggml_free"]

    def _fill(self, matrix: int, data: Tensor, orders: list[int]) -> int:
        """The buffer that the matrix got, in the backend's own order where there is one, or as it lies."""
        ggml = _functions()
        order = orders[0] if orders else ggml["ggml_backend_cpu_buffer_type"]()
        buffer: int = ggml["ggml_backend_alloc_ctx_tensors_from_buft"](self.matrices, order)
        if not buffer:
            raise Missing("ggml has no memory for the weight")
        ggml["ggml_backend_tensor_set"](matrix, data.data_ptr(), 0, data.nbytes)
        return buffer

    def __call__(self) -> Tensor:
        status = self.compute(self.graph, ctypes.byref(self.plan))
        if status:
            raise RuntimeError(f"ggml_graph_compute: status {status}")
        return self.out

    def __del__(self) -> None:
        if hasattr(self, "free"):
            _functions()["ggml_backend_buffer_free"](self.buffer)
            self.free(self.context)
            self.free(self.matrices)
