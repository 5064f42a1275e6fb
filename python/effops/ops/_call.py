"""How the public functions call their ops: below autograd where no gradient can flow."""

from __future__ import annotations

import torch
from torch import Tensor

from effops import _library

_library.require()

from effops.ops import _registration  # noqa: E402, F401  (registers fakes and autograd)

BelowAutograd = torch._C._AutoDispatchBelowAutograd
BelowADInplaceOrView = torch._C._AutoDispatchBelowADInplaceOrView
increment_version = torch.autograd.graph.increment_version
is_compiling = torch.compiler.is_compiling


def tracks_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd, or the compiler in its place, must see this call."""
    if is_compiling():
        return True
    if torch.is_grad_enabled():
        for t in tensors:
            if t is not None and t.requires_grad:
                return True
    return False
