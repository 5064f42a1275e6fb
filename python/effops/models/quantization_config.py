"""How a checkpoint's linear layers are quantised, as its configuration says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from effops.models.errors import CheckpointError


@dataclass(frozen=True)
class QuantizationConfig:
    """``quantization_config`` of a config.json."""

    method: str  # gptq, awq, or effops: layers as packed_checkpoint.py stores them
    bits: int = 0
    group_size: int = -1  # all inputs
    zero_less_one: bool = False
    activations: tuple[tuple[str, str], ...] = ()  # of effops: layers that round theirs

    @classmethod
    def read(cls, raw: Any, source: str) -> QuantizationConfig:
        """Raises CheckpointError for a method, a width or a layout that is not known."""
        if not isinstance(raw, Mapping):
            raise CheckpointError(source, "quantization_config", f"expected an object, got {raw!r}")
        method: Any = raw.get("quant_method")
        bits: Any = raw.get("bits")
        group_size: Any = raw.get("group_size")
        if method == "effops":
            activations: Any = raw.get("activations", {})
            if not isinstance(activations, Mapping) or any(a != "int8" for a in activations.values()):
                raise CheckpointError(source, "quantization_config", f"expected int8 activations, got {activations!r}")
            return cls(method, activations=tuple(activations.items()))
        if method not in ("gptq", "awq"):
            raise CheckpointError(
                source, "quantization_config", f"expected quant_method gptq, awq or effops, got {method!r}"
            )
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
