"""RMSNorm, Linear and the gated MLP.

Weights are ordinary parameters, allocated but not filled: whoever builds a model loads or draws them.
Forward reads them from the module's dictionaries, because attribute access through ``nn.Module`` costs half
a microsecond each and a decode step of a small model has hundreds. For the same reason modules call each
other's ``forward`` directly, which skips module hooks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from effops.nn import functional


def _empty(*shape: int, dtype: torch.dtype | None, device: torch.device | str | None) -> nn.Parameter:
    return nn.Parameter(torch.empty(*shape, dtype=dtype, device=device))


class RMSNorm(nn.Module):
    """x [...,D] / rms(x) · weight [D], statistics in float32."""

    def __init__(
        self,
        size: int,
        eps: float = 1e-6,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = _empty(size, dtype=dtype, device=device)

    def forward(self, x: Tensor) -> Tensor:
        own: Any = self._parameters
        return functional.rms_norm(x, own["weight"], self.eps)


class Linear(nn.Module):
    """x [...,K] · weight [N,K]ᵀ + bias, plus an optional residual [...,N] in the same pass over the output.

    ``norm``, a module, or the gated activation (``gated``) come first in the same call. Runs ``packed_linear``;
    torch's own operators where a gradient is needed.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.weight = _empty(out_features, in_features, dtype=dtype, device=device)
        self.register_parameter("bias", _empty(out_features, dtype=dtype, device=device) if bias else None)

    def forward(
        self, x: Tensor, residual: Tensor | None = None, norm: RMSNorm | None = None, gated: bool = False
    ) -> Tensor:
        own: Any = self._parameters
        if norm is None:
            return functional.linear(x, own["weight"], own["bias"], residual, gated=gated)
        first: Any = norm._parameters
        return functional.linear(x, own["weight"], own["bias"], residual, first["weight"], norm.eps, gated)


LINEARS = (Linear, nn.Linear)  # what packing and offloading replace


class MLP(nn.Module):
    """down(silu(gate(x)) · up(x)) with gate and up fused into one weight [2f, d], gate rows first."""

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        *,
        bias: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.gate_up_proj = Linear(hidden_size, 2 * intermediate_size, bias=bias, dtype=dtype, device=device)
        self.down_proj = Linear(intermediate_size, hidden_size, bias=bias, dtype=dtype, device=device)

    def forward(self, x: Tensor, residual: Tensor | None = None, norm: RMSNorm | None = None) -> Tensor:
        """The MLP of x, or of norm(x), plus the residual."""
        own: Any = self._modules
        hidden = own["gate_up_proj"].forward(x, None, norm)
        return own["down_proj"].forward(hidden, residual, None, True)
