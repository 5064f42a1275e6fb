"""What the autograd kernels of the ops share."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def tensors(named: dict[Any, Any]) -> dict[str, Tensor]:
    """The tensors of a call by name, those of lists with their place."""
    found = {}
    for name, x in named.items():
        if isinstance(x, Tensor):
            found[name] = x
        elif isinstance(x, list | tuple):
            found |= {f"{name}[{i}]": t for i, t in enumerate(x) if isinstance(t, Tensor)}
    return found


def needs_grad(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    named: dict[Any, Any] = dict(enumerate(args)) | kwargs
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors(named).values())


def first_order(backward: Callable[..., tuple[Tensor | None, ...]]) -> Callable[..., tuple[Tensor | None, ...]]:
    """A backward whose results cannot be differentiated again. Doing so raises even where the incoming gradient is
    a constant; torch's ``once_differentiable`` would then drop the term in silence."""

    @functools.wraps(backward)
    def wrapper(ctx: Any, *d_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            results = backward(ctx, *d_outputs)
        if not torch.is_grad_enabled():
            return results
        given = [x.detach().requires_grad_() for x in results if x is not None]
        refuse = torch._C._functions.DelayedError(b"effops: the ops have no second derivatives", len(given))
        marked = refuse(*given)
        each = iter((marked,) if isinstance(marked, Tensor) else marked)  # of one alone it is no tuple
        return tuple(None if x is None else next(each) for x in results)

    return wrapper
