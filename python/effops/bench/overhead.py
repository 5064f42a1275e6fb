"""The host's share of an op call: microseconds on operands so small that nothing else counts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.benchmark import Timer

from effops import ops


def host_cost(min_run_time: float = 0.2) -> dict[str, float]:
    """Median microseconds of a call, beside ``torch.empty_like``; ``attention`` has two outputs and 14 arguments."""
    x, weight = torch.ones(1, 16), torch.ones(16)
    q = torch.ones(1, 1, 1, 16)
    empty = torch.ones(1, 0, 1, 16)  # no keys: the call and its allocations remain
    outs, lses = torch.ones(1, 1, 16), torch.ones(1, 1)
    calls: dict[str, Callable[[], Any]] = {
        "torch.empty_like": lambda: torch.empty_like(x),
        "attention, no keys": lambda: ops.attention(q, empty, empty),
        "attention, one key": lambda: ops.attention(q, q, q, causal=True),
        "merge_states": lambda: ops.merge_states(outs, lses),
        "rms_norm": lambda: ops.rms_norm(x, weight),
        "packed_linear": lambda: ops.packed_linear(x, x),
    }
    return {
        name: Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
        .blocked_autorange(min_run_time=min_run_time)
        .median
        * 1e6
        for name, call in calls.items()
    }
