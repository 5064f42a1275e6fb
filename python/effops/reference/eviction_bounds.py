"""How far a correct attention mass may lie from the exact one; notation as in :mod:`effops.reference.bounds`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from effops.reference.attention import _per_sequence
from effops.reference.bounds import FLUSH, Interval, _chain, _compute_roundoff, _interval
from effops.reference.eviction import accumulate_mass, existing_keys


def accumulate_mass_bound(mass: Tensor, q: Tensor, k: Tensor, lse: Tensor, **options: Any) -> Interval:
    """What ``accumulate_mass`` makes of mass [B,G,L], itself not written, with n = T H / G rows a KV head.

    - a score is off as in ``attention_bound``: ``g(D + 3) S``, and 16 w M through tanh;
    - the weight exp(s - lse) has this as relative error, plus 4 w (M + |lse|) of the difference, whatever its base, and
      12 w of exp; each may flush to zero;
    - the sum over n rows takes g(n + 4), the addition to the mass w of the result.
    """
    w = _compute_roundoff(q.dtype)
    batch, tokens, heads, dim = q.shape
    kv_heads, capacity = mass.shape[1:]
    group = heads // kv_heads
    scale = abs(dim**-0.5 if options.get("scale") is None else options["scale"])
    starts, ends = (_per_sequence(options.get(name), default, batch, q.device)
                    for name, default in (("kv_starts", 0), ("kv_lens", capacity)))  # fmt: skip
    j = torch.arange(capacity, device=q.device)
    exists = (starts[:, None] <= j) & (j < ends[:, None])
    dense = {name: x for name, x in options.items() if name != "page_table"}
    q64, l64 = q.detach().double(), lse.detach().double()
    keys = existing_keys(k.detach().double(), exists, options.get("page_table"))

    def summed(to: Tensor, base: Tensor) -> Tensor:
        accumulate_mass(to, q64, keys, base, **dense)
        return to

    value = summed(mass.detach().double().clone(), l64)
    zeros = torch.zeros_like(value)
    sums = summed(zeros.clone(), l64)

    products = torch.einsum("bthd,blhd->bthl", q64.abs(), keys.abs().repeat_interleave(group, 2))
    largest = scale * torch.nn.functional.pad(products, (0, 1)).amax(-1)  # [B,T,H]
    softcap = options.get("softcap") or 0.0
    top = largest.clamp(max=softcap) if softcap else largest
    score = _chain(dim + 3, w) * largest + (16 * w * top if softcap else 0.0)
    if capacity:
        score = score + scale * dim * FLUSH * (
            q64.abs().amax(-1) + keys.abs().amax((1, 3)).repeat_interleave(group, 1)[:, None]
        )
    relative = torch.expm1(score + w * (4 * (top + torch.where(l64.isfinite(), l64.abs(), 0.0)) + 12))
    error = summed(zeros.clone(), l64 - torch.log(relative))  # each weight times its row's relative error
    rows = tokens * group
    error = error + _chain(rows + 4, w) * (sums + error) + (rows + 1) * FLUSH
    return _interval(value, error + w * (value.abs() + error), q.dtype)
