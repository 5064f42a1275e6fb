"""The hardware's limits as this process sees them now: read bandwidth R and GEMM peak P. Nothing from a datasheet."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from effops import _host, ops
from effops.ops.packed_experts import PackedExperts

MAX_DRIFT = 0.2  # samples farther apart than this make a row void
BUFFER_BYTES = 512 << 20
GPU_BUFFER_BYTES = 4 << 30
GEMMS = ((1024, 2048, 1024), (1024, 4096, 1024))  # m, k, n
GPU_GEMMS = ((8192, 8192, 8192), (8192, 4096, 8192))


def drift(samples: list[float]) -> float:
    """How far apart the samples are: 1 - smallest / largest."""
    return 1 - min(samples) / max(samples) if samples else 0.0


def seconds(call: Callable[[], Any], device: str = "cpu") -> float:
    """Of one call; on a GPU between two events of its stream."""
    if device == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def last_level_cache_bytes(device: str = "cpu") -> int:
    """The largest cache that Linux reports, 32 MiB where it reports none; a GPU's L2."""
    if device == "cuda":
        return int(torch.cuda.get_device_properties(0).L2_cache_size)
    sizes = [
        int(text[:-1]) << {"K": 10, "M": 20, "G": 30}[text[-1]]
        for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
        if (text := path.read_text().strip())[-1:] in "KMG" and text[:-1].isdecimal()
    ]
    return max(sizes, default=32 << 20)


@dataclass
class Samples:
    """R and P sampled around and between the timings of one row."""

    read: list[float] = field(default_factory=list)  # bytes/s
    peak: list[float] = field(default_factory=list)  # FLOP/s

    def drift(self, bytes_: float, flops: float) -> float:
        """That of the floors of the single samples: a limit that does not bind may move."""
        return drift([max(bytes_ / r, flops / p) for r, p in zip(self.read, self.peak, strict=True)])

    def floor(self, bytes_: float, flops: float) -> float:
        """The least seconds that so many bytes and FLOPs can take."""
        return max(bytes_ / median(self.read), flops / median(self.peak))


class Roof:
    """Samples R by the best of some read loops over one buffer and P by torch's GEMM of a dtype."""

    def __init__(self, buffer_bytes: int = BUFFER_BYTES, device: str = "cpu") -> None:
        self.device = device
        self.buffer = torch.ones(buffer_bytes // 4, device=device)
        matrix, x = self.buffer.view(-1, 4096), torch.ones(1, 4096, device=device)
        self.loops: dict[str, Callable[[], Any]] = {"torch.sum": self.buffer.sum, "torch.amax": self.buffer.amax}
        self.bytes: dict[str, int] = {}  # of loops that do not read all of the buffer
        if device == "cpu":
            self.loops["packed_linear"] = lambda: ops.packed_linear(x, matrix)
            self._add_panels()
        else:
            self.loops["torch.mv"] = lambda: matrix @ x[0]
        self.gemms = GEMMS if device == "cpu" else GPU_GEMMS
        self._gemms: dict[torch.dtype, list[tuple[torch.Tensor, torch.Tensor]]] = {}

    def _add_panels(self) -> None:
        """One token for each expert: where that reads several places by turns, it is the fastest loop of all."""
        d, f = 2048, 1024
        experts = self.buffer.numel() // (3 * d * f)
        if not experts:
            return
        up, down = self.buffer[: 3 * experts * d * f].split([2 * experts * d * f, experts * d * f])
        layer = (
            PackedExperts("f32", up.view(experts, -1, d, 32), panels_of=(experts, 2 * f, d), gated=True),
            PackedExperts("f32", down.view(experts, -1, f, 32), panels_of=(experts, d, f)),
        )
        x, weights = torch.ones(1, d), torch.ones(1, experts)
        ids = torch.arange(experts, dtype=torch.int32)[None]
        self.loops["panels"] = lambda: ops.fused_experts(x, *layer, weights, ids)
        self.bytes["panels"] = up.nbytes + down.nbytes

    def read(self) -> float:
        """Bytes a second of the fastest loop."""
        return max(self.bytes.get(n, self.buffer.nbytes) / seconds(f, self.device) for n, f in self.loops.items())

    def peak(self, dtype: torch.dtype) -> float:
        """FLOP/s of the fastest GEMM in the type that the kernels of ``dtype`` compute in."""
        compute = self._computes_in(dtype)
        if compute not in self._gemms:
            self._gemms[compute] = [
                tuple(torch.ones(rows, k, dtype=compute, device=self.device) for rows in (m, n))  # type: ignore[misc]
                for m, k, n in self.gemms
            ]
            self.peak(dtype)  # the first call of a shape prepares it
        rates = [2 * m * k * n for m, k, n in self.gemms]
        times = [seconds(partial(torch.nn.functional.linear, a, b), self.device) for a, b in self._gemms[compute]]
        return max(rate / t for rate, t in zip(rates, times, strict=True))

    def _computes_in(self, dtype: torch.dtype) -> torch.dtype:
        """float32 where no instruction multiplies the dtype: torch's GEMM of it is far from any limit there."""
        own = {torch.float64}
        if self.device != "cpu":
            own |= {torch.bfloat16, torch.float16}
        elif _host.cpu_isa() == "avx512bf16":
            own.add(torch.bfloat16)
        return dtype if dtype in own else torch.float32

    def sample(self, into: Samples, dtype: torch.dtype) -> None:
        into.read.append(self.read())
        into.peak.append(self.peak(dtype))
