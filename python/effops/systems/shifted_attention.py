"""Causal attention inside groups of tokens, some heads' groups shifted by half a group, with sinks that every group
sees: S²-Attn of LongLoRA (arXiv 2309.12307, section 3.2) and SF-Attn of SinkLoRA (arXiv 2406.05678, section 3)."""

from __future__ import annotations

import torch
from torch import Tensor

from effops import ops


def shifted_group_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    group_size: int,
    *,
    shift_heads: int = 0,
    num_sinks: int = 0,
    wraparound: bool = False,
) -> Tensor:
    """Attention of whole sequences to themselves, about ``group_size / T`` of the work of all of it.

    Query i sees key ``j <= i`` of its own group, and the first ``num_sinks`` keys. Groups are ``group_size`` tokens; of
    the last ``shift_heads`` query heads they begin at ``group_size // 2``, and the tokens before are a group of their
    own. The last group may be shorter.

    Args:
        q: ``[B, T, H, D]``; k, v: ``[B, T, G, D or Dv]``, dtypes as :func:`effops.ops.attention`.
        shift_heads: how many query heads are shifted; LongLoRA H / 2, SinkLoRA a part of these.
        num_sinks: first keys that every later query sees as well; each is counted once.
        wraparound: LongLoRA's own form. Shifted heads' last half group and first half group are one, in this order, so
            that the first tokens see the last ones; not causal, and T must be a multiple of ``group_size``.

    Returns:
        ``[B, T, H, Dv]``. Differentiable in q, k and v.

    Raises:
        ValueError: sizes that do not fit each other.
    """
    _check(q, k, v, group_size, shift_heads, num_sinks, wraparound)
    heads, kv_heads = q.shape[2], k.shape[2]
    plain = heads - shift_heads
    parts = []
    for first, last, offset in ((0, plain, 0), (plain, heads, group_size // 2)):
        if first == last:
            continue
        own_k, own_v = (x[:, :, _kv_heads(first, last, heads // kv_heads)] for x in (k, v))
        parts.append(_grouped(q[:, :, first:last], own_k, own_v, group_size, offset, num_sinks, wraparound))
    return torch.cat(parts, 2)


def _check(
    q: Tensor, k: Tensor, v: Tensor, group_size: int, shift_heads: int, num_sinks: int, wraparound: bool
) -> None:
    def wrong(argument: str, expected: str, got: object) -> ValueError:
        return ValueError(f"shifted_group_attention: {argument}: expected {expected}, got {got}")

    if q.dim() != 4 or k.dim() != 4 or v.dim() != 4 or q.shape[:2] != k.shape[:2] or k.shape[:3] != v.shape[:3]:
        shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v))
        raise wrong("q, k, v", "[B,T,H,D], [B,T,G,D], [B,T,G,Dv]", shapes)
    if not k.shape[2] or q.shape[2] % k.shape[2]:
        raise wrong("q", f"a multiple of {k.shape[2]} heads", q.shape[2])
    if group_size < 1:
        raise wrong("group_size", "1 or more", group_size)
    if not 0 <= shift_heads <= q.shape[2]:
        raise wrong("shift_heads", f"a number in [0, {q.shape[2]}]", shift_heads)
    if num_sinks < 0:
        raise wrong("num_sinks", "0 or more", num_sinks)
    if wraparound and q.shape[1] % group_size:
        raise wrong("group_size", f"a divisor of T = {q.shape[1]} with wraparound", group_size)
    if wraparound and shift_heads and num_sinks > group_size // 2:
        raise wrong("num_sinks", f"at most half a group of {group_size} with wraparound", num_sinks)


def _kv_heads(first: int, last: int, ratio: int) -> slice | list[int]:
    """The KV heads of query heads ``first`` to ``last``: a stretch, or one for each where a KV head's are divided."""
    if first % ratio == 0 and last % ratio == 0:
        return slice(first // ratio, last // ratio)
    return [h // ratio for h in range(first, last)]


def _grouped(q: Tensor, k: Tensor, v: Tensor, group_size: int, offset: int, num_sinks: int, wraparound: bool) -> Tensor:
    batch, count = q.shape[:2]
    cyclic = wraparound and offset > 0
    if cyclic:
        starts = [0, *range(group_size, count, group_size)]
        qr, kr, vr = (x.roll(-offset, 1) for x in (q, k, v))
        out, lse = (x.roll(offset, 1) for x in _ragged(qr, kr, vr, starts))
        seen = [(0, 0), (offset, num_sinks)]  # the first half group has the sinks in its own
    else:
        starts = [0, *range(offset or group_size, count, group_size)]
        out, lse = _ragged(q, k, v, starts)
        seen = [(start, min(num_sinks, start)) for start in starts]  # those that are in no group of the query's
    if num_sinks == 0 or count <= seen[-1][0]:
        return out
    ends = [start for start, _ in seen[1:]] + [count]
    keys, values = (torch.cat([x[:, :n] for _, n in seen], 1).flatten(0, 1) for x in (k, v))
    sink_out, sink_lse = ops.varlen_attention(
        q.flatten(0, 1), keys, values,
        _offsets([end - start for end, (start, _) in zip(ends, seen, strict=True)], batch, q.device),
        _offsets([n for _, n in seen], batch, q.device), return_lse=True,
    )  # fmt: skip
    outs = torch.stack([out, sink_out.unflatten(0, (batch, count))])
    lses = torch.stack([lse, sink_lse.unflatten(0, (batch, count))])
    return ops.merge_states(outs, lses)[0]


def _ragged(q: Tensor, k: Tensor, v: Tensor, starts: list[int]) -> tuple[Tensor, Tensor]:
    """Causal attention inside the groups that begin at ``starts`` of every sequence, and its log-sum-exp."""
    batch, count = q.shape[:2]
    lengths = [end - start for start, end in zip(starts, [*starts[1:], count], strict=True)]
    offsets = _offsets(lengths, batch, q.device)
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    out, lse = ops.varlen_attention(q, k, v, offsets, offsets, causal=True, return_lse=True)
    return out.unflatten(0, (batch, count)), lse.unflatten(0, (batch, count))


def _offsets(lengths: list[int], batch: int, device: torch.device) -> Tensor:
    """int32 [batch * groups + 1]: where each group begins in the batch as one sequence."""
    sums = torch.tensor(lengths).repeat(batch).cumsum(0)
    return torch.cat([sums.new_zeros(1), sums]).int().to(device)
