"""Low-rank updates of a model's linear layers, for fine-tuning (LoRA, arXiv 2106.09685)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effops.models import Llama
from effops.nn import Linear, RMSNorm, functional


class LoRALinear(nn.Module):
    """``Linear``'s call with ``alpha / rank * up · down`` added to its weight; the weight itself is frozen.

    ``down`` ``[parts * rank, K]`` is drawn as torch draws linear layers, ``up`` ``[N, rank]`` is zero, so that nothing
    changes at first. ``parts`` splits the N outputs into stretches with a rank of their own each, as where one weight
    holds the projections of queries, keys and values.

    Raises:
        ValueError: a base that is not a plain layer (one in few bits), no rank, or parts that do not sum to N.
    """

    def __init__(
        self, base: Linear, rank: int, *, alpha: float = 16.0, parts: Sequence[int] = (), seed: int = 0
    ) -> None:
        super().__init__()
        if not isinstance(base, Linear):
            raise ValueError(f"LoRALinear: base: expected a plain linear layer, got {type(base).__name__}")
        outputs, inputs = base.weight.shape
        self.parts = tuple(parts) or (outputs,)
        if rank < 1:
            raise ValueError(f"LoRALinear: rank: expected 1 or more, got {rank}")
        if sum(self.parts) != outputs or min(self.parts) < 1:
            raise ValueError(f"LoRALinear: parts: expected sizes that sum to {outputs}, got {self.parts}")
        base.requires_grad_(False)
        self.base, self.rank, self.scale = base, rank, alpha / rank
        place: Any = {"dtype": base.weight.dtype, "device": base.weight.device}
        generator = torch.Generator(base.weight.device).manual_seed(seed)
        self.down = nn.Parameter(torch.empty(len(self.parts) * rank, inputs, **place))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5), generator=generator)
        self.up = nn.Parameter(torch.zeros(outputs, rank, **place))

    def forward(
        self, x: Tensor, residual: Tensor | None = None, norm: RMSNorm | None = None, gated: bool = False
    ) -> Tensor:
        if norm is not None:
            x = norm(x)
        if gated:
            x = functional.silu_mul(x)
        low = F.linear(x, self.down).split(self.rank, -1)
        added = torch.cat([F.linear(a, b) for a, b in zip(low, self.up.split(self.parts), strict=True)], -1)
        return cast(Tensor, self.base(x, residual)) + self.scale * added

    @torch.no_grad()
    def merged(self) -> Linear:
        """The base layer with the update in its weight, which may be trained again."""
        pairs = zip(self.up.split(self.parts), self.down.split(self.rank), strict=True)
        self.base.weight.add_(self.scale * torch.cat([up @ down for up, down in pairs]))
        self.base.requires_grad_(True)
        return self.base


def add_lora_(model: Llama, rank: int = 8, *, alpha: float = 16.0, seed: int = 0) -> list[nn.Parameter]:
    """Makes LongLoRA's training set-up of a model with ordinary attention, in place: everything frozen but low-rank
    updates of the query, key, value and output projections, the embedding and the norms. ``seed`` is of what they are
    drawn from. The parameters to train."""
    model.requires_grad_(False)
    first = 2 * len(model.layers) * seed  # two draws a layer
    for i, layer in enumerate(model.layers):
        attention: Any = layer.self_attn
        heads = (attention.num_heads, attention.num_kv_heads, attention.num_kv_heads)
        parts = [n * attention.head_dim for n in heads]
        attention.qkv_proj = LoRALinear(attention.qkv_proj, rank, alpha=alpha, parts=parts, seed=first + 2 * i)
        attention.o_proj = LoRALinear(attention.o_proj, rank, alpha=alpha, seed=first + 2 * i + 1)
    for module in model.modules():
        if isinstance(module, RMSNorm | nn.Embedding):
            module.requires_grad_(True)
        elif isinstance(module, LoRALinear):
            module.down.requires_grad_(True)
            module.up.requires_grad_(True)
    return [p for p in model.parameters() if p.requires_grad]


def merge_lora_(model: Llama) -> None:
    """Puts every update into its weight, in place, so that the model is an ordinary one again."""
    for layer in model.layers:
        attention: Any = layer.self_attn
        attention.qkv_proj, attention.o_proj = attention.qkv_proj.merged(), attention.o_proj.merged()
    model.requires_grad_(True)
