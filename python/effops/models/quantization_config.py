"""How a checkpoint's linear layers are quantised, as its configuration says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from effops.models.errors import CheckpointError


@dataclass(frozen=True)
class QuantizationConfig:
    """``quantization_config`` of a config.json."""

    method: str  # gptq or awq
    bits: int
    group_size: int  # -1: all inputs
    zero_less_one: bool = False

    @classmethod
    def read(cls, raw: Any, source: str) -> QuantizationConfig:
        """Raises CheckpointError for a method, a width or a layout that is not known."""
        if not isinstance(raw, Mapping):
            raise CheckpointError(source, "quantization_config", f"expected an object, got {raw!r}")
        method: Any = raw.get("quant_method")
        bits: Any = raw.get("bits")
        group_size: Any = raw.get("group_size")
        if method not in ("gptq", "awq"):
            raise CheckpointError(source, "quantization_config", f"expected quant_method gptq or awq, got {method!r}")
        widths = (4, 8) if method == "gptq" else (4,)
        if bits not in widths:
            raise CheckpointError(source, "quantization_config", f"expected {widths} bits of {method}, got {bits!r}")
        if not isinstance(group_size, int) or group_size == 0 or group_size < -1:
            raise CheckpointError(source, "quantization_config", f"expected a group_size, got {group_size!r}")
        if method == "awq" and raw.get("version", "gemm") != "gemm":
            raise CheckpointError(source, "quantization_config", f"expected version gemm, got {raw['version']!r}")
        stored = raw.get("checkpoint_format", "gptq")
        if method == "gptq" and stored not in ("gptq", "gptq_v2"):
            raise CheckpointError(source, "quantization_config", f"expected gptq or gptq_v2, got {stored!r}")
        return cls(method, bits, group_size, method == "gptq" and stored == "gptq")
