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
is_inference_mode = torch.is_inference_mode_enabled


def dispatches(*tensors: Tensor | None) -> bool:
    """Whether the op is called as it is: autograd, or the compiler in its place, must see the call, or inference mode
    keeps autograd away already (entering a guard costs half a microsecond)."""
    if is_compiling() or is_inference_mode():
        return True
    if torch.is_grad_enabled():
        for t in tensors:
            if t is not None and t.requires_grad:
                return True
    return False


def tracks_grad(*tensors: Tensor) -> bool:
    """Whether autograd, or the compiler in its place, must see this call that writes into tensors."""
    if is_compiling():
        return True
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
