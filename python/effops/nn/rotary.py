"""Rotary position embeddings and their scalings, as Hugging Face configurations state them.

``parameters`` is the ``rope_parameters`` dictionary of a configuration: ``rope_theta``, ``rope_type`` and
the fields of that type. Frequencies and angles are formed in float32, as in the code the models were
trained with.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

# The known types and the fields that each cannot do without.
ROPE_TYPES: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": (),
    "longrope": ("short_factor", "long_factor"),
}


def inverse_frequencies(
    dim: int, parameters: Mapping[str, Any], max_position_embeddings: int, length: int = 0
) -> tuple[Tensor, float]:
    """Inverse frequencies float32 [dim/2] and the factor on cos and sin, for sequences of ``length`` tokens.

    Sources: dynamic NTK scaling (Transformers documentation), Llama 3.1 model card, YaRN (arXiv:2309.00071),
    LongRoPE (arXiv:2402.13753). Only dynamic and longrope depend on ``length``.
    """
    kind = parameters.get("rope_type", "default")
    theta = float(parameters["rope_theta"])
    factor: Any = parameters.get("factor")
    trained = parameters.get("original_max_position_embeddings") or max_position_embeddings
    exponents = torch.arange(0, dim, 2, dtype=torch.float32) / dim
    if kind == "default":
        return 1.0 / theta**exponents, 1.0
    if kind == "linear":
        return 1.0 / theta**exponents / factor, 1.0
    if kind == "dynamic":
        stretch = factor * max(length, max_position_embeddings) / max_position_embeddings - (factor - 1)
        return 1.0 / (theta * stretch ** (dim / (dim - 2))) ** exponents, 1.0
    if kind == "llama3":
        return _llama3(1.0 / theta**exponents, parameters, trained), 1.0
    if factor is None:
        factor = max_position_embeddings / trained
    if kind == "yarn":
        return _yarn(dim, theta, exponents, factor, parameters, trained)
    if kind == "longrope":
        stretches = parameters["long_factor" if length > trained else "short_factor"]
        scale = parameters.get("attention_factor")
        if scale is None:
            scale = math.sqrt(1 + math.log(factor) / math.log(trained)) if factor > 1 else 1.0
        return 1.0 / (torch.tensor(stretches, dtype=torch.float32) * theta**exponents), scale
    raise ValueError(f"RotaryEmbedding: rope_type: expected one of {', '.join(ROPE_TYPES)}, got {kind!r}")


def _llama3(plain: Tensor, parameters: Mapping[str, Any], trained: int) -> Tensor:
    """Long wavelengths divided by the factor, short ones kept, a linear blend in between."""
    low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
    turns = trained / (2 * math.pi / plain)
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - keep) * plain / parameters["factor"] + keep * plain


def _yarn(
    dim: int, theta: float, exponents: Tensor, factor: float, parameters: Mapping[str, Any], trained: int
) -> tuple[Tensor, float]:
    """Interpolated frequencies below ``beta_slow`` turns, plain ones above ``beta_fast``, a ramp between."""

    def dimension_of(turns: float) -> float:
        return dim * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(theta))

    def magnitude(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    first = dimension_of(parameters.get("beta_fast") or 32)
    last = dimension_of(parameters.get("beta_slow") or 1)
    if parameters.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dim - 1)
    if first == last:
        last += 0.001  # a step instead of a ramp
    plain = 1 - ((torch.arange(dim // 2, dtype=torch.float32) - first) / (last - first)).clamp(0, 1)
    wavelengths = theta**exponents
    inverse = 1.0 / (factor * wavelengths) * (1 - plain) + 1.0 / wavelengths * plain

    scale = parameters.get("attention_factor")
    if scale is None:
        numerator, denominator = parameters.get("mscale") or 0.0, parameters.get("mscale_all_dim") or 0.0
        both = numerator and denominator
        scale = magnitude(numerator) / magnitude(denominator) if both else magnitude(1.0)
    return inverse, scale


class RotaryEmbedding:
    """The cos and sin tables [P, R/2] that ``effops.ops.rotary`` reads, grown on demand.

    Not a module and without buffers, so that casting a model leaves the tables in float32.
    """

    def __init__(
        self,
        head_dim: int,
        max_position_embeddings: int,
        parameters: Mapping[str, Any] | None = None,
    ) -> None:
        self.parameters: Mapping[str, Any] = parameters or {"rope_type": "default", "rope_theta": 10000.0}
        self.dim = int(head_dim * self.parameters.get("partial_rotary_factor", 1.0))
        self.max_position_embeddings = max_position_embeddings
        self._tables: tuple[Tensor, Tensor] | None = None
        self._range = range(0)  # the sequence lengths that the tables serve
        inverse_frequencies(self.dim, self.parameters, max_position_embeddings)  # refuses unknown types now

    def tables(self, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """cos, sin float32 with at least ``length`` rows, for sequences of ``length`` tokens."""
        if self._tables is None or length not in self._range or self._tables[0].device != device:
            self._build(length, device)
        assert self._tables is not None
        return self._tables

    def one_table(self, first: int, last: int) -> bool:
        """Whether sequences of every length from ``first`` to ``last`` tokens turn by the same angles. Tokens of a step
        that stand at several depths share one table, so that it has to be that of each."""
        kind = self.parameters.get("rope_type", "default")
        trained = self.parameters.get("original_max_position_embeddings") or self.max_position_embeddings
        if kind == "dynamic":
            return last <= self.max_position_embeddings or first == last
        return kind != "longrope" or last <= trained or first > trained

    def _build(self, length: int, device: torch.device) -> None:
        kind = self.parameters.get("rope_type", "default")
        trained = self.parameters.get("original_max_position_embeddings") or self.max_position_embeddings
        rows = max(1024, 1 << (length - 1).bit_length())
        first = 0
        if kind == "dynamic" and length > self.max_position_embeddings:
            first, rows = length, length  # every length has frequencies of its own
        elif kind == "dynamic":
            rows = self.max_position_embeddings
        elif kind == "longrope" and length > trained:
            first = trained + 1
        elif kind == "longrope":
            rows = trained
        with torch.inference_mode(False), torch.no_grad():
            inverse, scale = inverse_frequencies(self.dim, self.parameters, self.max_position_embeddings, length)
            angles = torch.arange(rows, dtype=torch.float32)[:, None] * inverse
            self._tables = ((angles.cos() * scale).to(device), (angles.sin() * scale).to(device))
        self._range = range(first, rows + 1)
