"""torch's flex_attention, compiled for one shape, with a boolean mask as its mask_mod."""

from __future__ import annotations

import torch
from torch import Tensor

from effops.bench.work import Missing


class Flex:
    """Attention of q [B,T,H,D] under a mask [T,L], over k, v [B,L,G,D] of one shape and layout.

    Compiled and run once over the first k and v. The block mask, made once a step for all layers, is not timed.
    """

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> None:
        rows, keys = mask.shape
        self.q, self.gqa = q.transpose(1, 2), q.shape[2] != k.shape[2]
        torch.compiler.reset()  # every shape counts against a limit of recompilations
        try:
            from torch.nn.attention.flex_attention import create_block_mask, flex_attention

            self.blocks = create_block_mask(lambda b, h, i, j: mask[i, j], None, None, rows, keys, device=q.device)
            self.compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)
            self(k, v)
        except Exception as error:  # no compiler, a shape that it does not take, ...
            first = next(iter(str(error).splitlines()), "")
            raise Missing(f"cannot be compiled here: {type(error).__name__}: {first}") from None

    def __call__(self, k: Tensor, v: Tensor) -> Tensor:
        k, v = k.transpose(1, 2), v.transpose(1, 2)
        out: Tensor = self.compiled(self.q, k, v, block_mask=self.blocks, enable_gqa=self.gqa)
        return out.transpose(1, 2)
