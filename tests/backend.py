"""Which backend the tests run on: ``EFFOPS_BACKEND`` is ``cpu`` (the default), ``simt`` (the library obeys it too) or
``cuda``: every op is then called with CUDA copies of its CPU arguments, and what it returns or writes comes back."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from effops._backends import WITHOUT_DEVICE_KERNEL
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

NAME = os.environ.get("EFFOPS_BACKEND") or "cpu"
if NAME == "cuda":
    del os.environ["EFFOPS_BACKEND"]  # the library takes CUDA tensors as they come
    os.environ.setdefault("EFFOPS_CHECK", "1")  # refusals are tested too


def cpu_only(reason: str) -> pytest.MarkDecorator:
    """For a test of what only the CPU's kernels have."""
    return pytest.mark.skipif(NAME != "cpu", reason=f"{NAME}: {reason}")


def sized(count: int, on_simt: int) -> int:
    """The host machine is ten thousand times slower than a GPU: fewer rows, examples or repetitions serve there."""
    return on_simt if NAME == "simt" else count


class Copies:
    """Copies of tensors on a device: of their whole memory, so that strides and what lies between elements stay, and
    one for all tensors that share it."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.memory: dict[int, tuple[Tensor, Tensor]] = {}

    def of(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu":
            return x
        storage = x.untyped_storage()
        if storage.data_ptr() not in self.memory:
            host = torch.empty(0, dtype=torch.uint8).set_(storage)
            self.memory[storage.data_ptr()] = host, torch.empty_like(host, device=self.device).copy_(host)
        there = self.memory[storage.data_ptr()][1].untyped_storage()
        view = torch.empty(0, dtype=x.dtype, device=self.device)
        view.set_(there, x.storage_offset(), x.shape, x.stride())
        return torch._neg_view(view) if x.is_neg() else view

    def write_back(self) -> None:
        for host, there in self.memory.values():
            host.copy_(there)


class OnDevice(TorchDispatchMode):
    """Runs the ops that have device kernels on copies there."""

    def __init__(self, device: str = "cuda") -> None:
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if op.namespace != "effops" or op._schema.name.removeprefix("effops::") in WITHOUT_DEVICE_KERNEL:
            return op(*args, **kwargs)
        copies = Copies(self.device)
        args, kwargs = tree_map_only(Tensor, copies.of, (args, kwargs))
        got = op(*args, **kwargs)
        if op._schema.is_mutable:
            copies.write_back()
        return tree_map_only(Tensor, Tensor.cpu, got)
