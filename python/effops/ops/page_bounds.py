"""Which pages of a cache a query is likeliest to attend to: by bounds, the least and the largest of each channel over
the keys of a page."""

from __future__ import annotations

import torch
from torch import Tensor

from effops.ops._call import BelowADInplaceOrView, BelowAutograd, dispatches, increment_version, tracks_grad

_append_page_bounds = torch.ops.effops.append_page_bounds.default
_page_topk = torch.ops.effops.page_topk.default


def append_page_bounds(low: Tensor, high: Tensor, k: Tensor, slots: Tensor, page: int) -> None:
    """Widens the bounds of pages by new keys, in place.

    Token s of a sequence belongs to page ``s // page``. The tokens of a call go in their order: the one in the first
    place of its page (``s % page == 0``) begins the page anew with its own key as both bounds, all others lower
    ``low`` and raise ``high`` where their key lies outside. Bounds of tokens that were given up thus stay until the
    page begins anew: too wide, never too narrow.

    Args:
        low, high: ``[B, P, G, D]``, float32, bfloat16, float16 or float64, any strides; searching is fastest where a
            head's pages are neighbours in memory (``[B, G, P, D]`` seen through a transposition).
        k: ``[B, T, G, D]``, low's dtype, no NaN.
        slots: int32 ``[B, T]`` in [0, P * page); -1 skips.
        page: tokens a page, 1 or more.

    Raises:
        RuntimeError: a slot, a dtype or a shape that does not fit; nothing is written. No gradient.
    """
    if tracks_grad(low, high, k):
        _append_page_bounds(low, high, k, slots, page)
        return
    with BelowADInplaceOrView():
        _append_page_bounds(low, high, k, slots, page)
    if not low.is_inference():
        increment_version((low, high))


def page_topk(
    q: Tensor,
    low: Tensor,
    high: Tensor,
    pages: int,
    page: int,
    *,
    kv_lens: Tensor | None = None,
    num_sinks: int = 0,
    window: int = 0,
    each_head: bool = False,
) -> Tensor:
    """The tokens of the pages that each list has, those with the largest bounds: what :func:`sparse_attention` takes.

    A query head's bound of a page is ``sum over channels of max(q * low, q * high)``, at least the dot product with
    every key of the page, and a list's bound the largest of its heads'. Of equal bounds the lowest pages are taken.
    Products and sums are float32 ones in one order (channel c in number c % 32 of 32 sums, then by halves), so that
    lists of finite numbers are the same with every instruction set and on every device, and with keys as bounds
    (``page = 1``) no token's score lies above the bound of a page that has it. Bytes read: ``2 * D`` elements a page
    and list.

    Args:
        q: ``[B, 1, H, D]``, float32, bfloat16, float16 or float64; float64 is rounded to float32.
        low, high: q's dtype ``[B, P, G, D]``, as :func:`append_page_bounds` left them. Those of pages outside the
            cache are never read.
        pages: pages a list, those of ``num_sinks`` and ``window`` included.
        page: tokens a page.
        kv_lens: int32 ``[B]`` in [0, P * page], the tokens of each sequence that there are; None: all.
        num_sinks, window: the pages of so many first and last tokens are in every list whatever their bounds.
        each_head: a list for each query head ``[B, H, pages * page]`` instead of each KV head.

    Returns:
        int32 ``[B, G, pages * page]``: positions below ``kv_lens``, ascending; -1 after the last.

    Raises:
        RuntimeError: fewer ``pages`` than ``num_sinks`` and ``window`` may touch, ``ceil(num_sinks / page) +
            ceil((window - 1) / page) + 1`` (without the last two where window is 0); lengths out of range, shapes that
            do not fit. No gradient.

    Quest (arXiv 2406.10774, section 3.3).
    """
    options = {"num_sinks": num_sinks, "window": window, "each_head": each_head}
    if dispatches(q, low, high):
        return _page_topk(q, low, high, pages, page, kv_lens=kv_lens, **options)
    with BelowAutograd():
        return _page_topk(q, low, high, pages, page, kv_lens=kv_lens, **options)
