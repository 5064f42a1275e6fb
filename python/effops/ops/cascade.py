"""Attention over a tree of shared prefixes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from effops.ops._call import BelowAutograd, dispatches

_cascade_attention = torch.ops.effops.cascade_attention.default


class KVLevel(NamedTuple):
    """The keys and values of one level of :func:`cascade_attention`: g groups of rows of q, each with keys of its own.

    k ``[g, L, G, D]``, v ``[g, L, G, Dv]``; or pages ``[P, page, G, D]`` with ``page_table`` int32 ``[g, entries]``.
    ``lens`` int32 ``[g]``: the keys of each group. ``group_indptr`` int32 ``[g + 1]``, ascending from 0: group i is
    rows ``[group_indptr[i], group_indptr[i + 1])`` of q.
    """

    k: Tensor
    v: Tensor
    lens: Tensor
    group_indptr: Tensor
    page_table: Tensor | None = None


@overload
def cascade_attention(
    q: Tensor, levels: Sequence[KVLevel], *, return_lse: Literal[False] = ..., **options: Any
) -> Tensor: ...
@overload
def cascade_attention(
    q: Tensor, levels: Sequence[KVLevel], *, return_lse: Literal[True], **options: Any
) -> tuple[Tensor, Tensor]: ...
def cascade_attention(  # type: ignore[misc]  # the overloads spell the options loosely
    q: Tensor,
    levels: Sequence[KVLevel],
    *,
    causal: bool = False,
    ancestors: Tensor | None = None,
    depths: Tensor | None = None,
    sink_logits: Tensor | None = None,
    softcap: float = 0.0,
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of ragged rows to keys that groups of them share, level by level: exact, each level's keys read once.

    A row attends to the keys of its group of every level, as if they stood one after the other, from the first level
    (the most shared) to the last (its own). All levels but the last are unmasked, for their keys precede every query;
    there all rows of a group meet its keys in one product. Partial results are float32 (float64 for float64) and joined
    by their log-sum-exp.

    Args:
        q: ``[N, H, D]``, float32, bfloat16, float16, or (CPU) float64; any strides. The rows of a group lie together:
            sequences in the order of the prefix tree.
        levels: one or more :class:`KVLevel`, of one G, D and Dv. A row of no group of a level has no keys there; groups
            may have no rows and no keys.
        causal: the last level is causal, its rows bottom-right aligned to its ``lens``, which count their own keys.
        ancestors, depths: the last level is trees of draft tokens, as in :func:`tree_attention`; excludes ``causal``.
        sink_logits: float32 ``[H]``, logits that enter the denominator only, of the rows of the last level's groups.
        softcap, scale, return_lse: as in :func:`attention`.

    Returns:
        out ``[N, H, Dv]`` in q's dtype; with ``return_lse`` also lse ``[N, H]``. A row without keys gives 0 and -inf.

    Raises:
        RuntimeError: naming the argument, ``k[i]``, ``lens[i]`` and so on for level i, what was expected and what came.

    No gradient. One level has the bits of :func:`paged_attention` and :func:`tree_attention`. Hydragen
    (arXiv 2402.05099), cascade inference of FlashInfer (arXiv 2501.01005).
    """
    none = all(level.page_table is None for level in levels)
    dense = q.new_empty(0, dtype=torch.int32)
    lists = (
        [level.k for level in levels], [level.v for level in levels], [level.lens for level in levels],
        [level.group_indptr for level in levels],
        [] if none else [dense if level.page_table is None else level.page_table for level in levels],
    )  # fmt: skip
    options: dict[str, Any] = {"causal": causal}
    if not ancestors is depths is sink_logits is scale is None or softcap:
        options |= {
            "ancestors": ancestors, "depths": depths, "sink_logits": sink_logits, "softcap": softcap, "scale": scale,
        }  # fmt: skip
    if dispatches(q, *lists[0], *lists[1], sink_logits):
        out, lse = _cascade_attention(q, *lists, **options)
    else:
        with BelowAutograd():
            out, lse = _cascade_attention(q, *lists, **options)
    return (out, lse) if return_lse else out
