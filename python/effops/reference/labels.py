"""Labels of keys, and the tokens that they select."""

from __future__ import annotations

import torch
from torch import Tensor


def label_values(labels: Tensor, channels: int, bits: int) -> Tensor:
    """float64 [B,L,G,channels] of stored labels: numbers as they are, those of few bits as the integers they are."""
    if bits == 0:
        return labels.double()
    shifts = torch.arange(0, 32, bits, device=labels.device)
    values = (labels[..., None] >> shifts & (1 << bits) - 1) - (1 << bits - 1)
    return values.flatten(-2)[..., :channels].double()


def _channels(x: Tensor, channels: Tensor) -> Tensor:
    """[..., G, r] of x [..., G, D]."""
    return x.gather(-1, channels.long().expand(*x.shape[:-1], channels.shape[-1]))


def append_labels(
    labels: Tensor,
    k: Tensor,
    slots: Tensor,
    channels: Tensor,
    *,
    scales: Tensor | None = None,
    offsets: Tensor | None = None,
    bits: int = 0,
) -> None:
    """Writes the labels of k [B,T,G,D] in place into labels [B,L,G,r], or int32 words [B,L,G,ceil(r * bits / 32)], at
    slots int32 [B,T]; -1 skips."""
    x = _channels(k.float(), channels) - (0 if offsets is None else offsets)
    if bits != 0:
        half = 1 << bits - 1
        x = x if scales is None else x / scales
        codes = x.nan_to_num(0, torch.inf, -torch.inf).round().clamp(-half, half - 1).long() + half
        a_word = 32 // bits
        codes = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % a_word)).unflatten(-1, (-1, a_word))
        words = (codes << torch.arange(0, 32, bits, device=k.device)).sum(-1)
        x = torch.where(words >= 1 << 31, words - (1 << 32), words)
    for b, row in enumerate(slots.tolist()):
        for t, slot in enumerate(row):
            if slot >= 0:
                labels[b, slot] = x[b, t].to(labels.dtype)


def label_scores(
    q: Tensor,
    labels: Tensor,
    channels: Tensor,
    *,
    scales: Tensor | None = None,
    each_head: bool = False,
    bits: int = 0,
) -> Tensor:
    """float64 [B, G or H, L]: by what ``label_topk`` orders the tokens of each list. Exact for labels of few bits,
    whose scores are integers."""
    kv_heads = channels.shape[0]
    group = q.shape[2] // kv_heads
    x = q[:, 0].float().unflatten(1, (kv_heads, group))
    x = x.gather(-1, channels.long()[None, :, None].expand(*x.shape[:-1], -1))  # [B, G, R, r]
    x = x if scales is None else x * scales[:, None]
    if bits != 0 and x.numel() > 0:
        step = x.abs().amax(-1, keepdim=True) if each_head else x.abs().amax((-2, -1), keepdim=True)
        step = step / 127
        x = torch.where(step > 0, (x / step).round(), 0.0)
    values = label_values(labels, channels.shape[1], bits)
    scores = torch.einsum("bgrc,blgc->bgrl", x.double(), values)
    return scores.flatten(1, 2) if each_head else scores.amax(2)


def label_topk(
    q: Tensor,
    labels: Tensor,
    channels: Tensor,
    k: int,
    *,
    scales: Tensor | None = None,
    kv_lens: Tensor | None = None,
    kv_starts: Tensor | None = None,
    num_sinks: int = 0,
    window: int = 0,
    each_head: bool = False,
    bits: int = 0,
) -> Tensor:
    """int32 [B, G or H, k]: the first ``num_sinks`` and the last ``window`` tokens of each sequence, and of those
    between them the ones with the largest ``label_scores``, of equals the lowest; ascending, -1 after the last."""
    scores = label_scores(q, labels, channels, scales=scales, each_head=each_head, bits=bits)
    batch, lists, capacity = scores.shape
    indices = torch.full((batch, lists, k), -1, dtype=torch.int32, device=q.device)
    for b in range(batch):
        end = capacity if kv_lens is None else int(kv_lens[b])
        start = min(end, 0 if kv_starts is None else int(kv_starts[b]))
        first = min(start + num_sinks, end)
        last = max(first, end - window)
        for i in range(lists):
            order = scores[b, i, first:last].argsort(descending=True, stable=True) + first
            free = order[: k - (first - start) - (end - last)].sort().values
            whole = [torch.arange(start, first), free.cpu(), torch.arange(last, end)]
            chosen = torch.cat(whole)
            indices[b, i, : len(chosen)] = chosen.to(indices)
    return indices
