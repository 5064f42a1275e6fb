"""Token trees and their verification: which drafted nodes stay, and the token after them."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from effops.ops._call import BelowAutograd, dispatches

_medusa_draft = torch.ops.effops.medusa_draft.default
_pack_ancestors = torch.ops.effops.pack_ancestors.default
_verify_greedy = torch.ops.effops.verify_greedy.default
_verify_rejection = torch.ops.effops.verify_rejection.default
_verify_typical = torch.ops.effops.verify_typical.default


class Accepted(NamedTuple):
    """What a step keeps of its tree.

    ``nodes``: int32 ``[B, T]``, the accepted nodes, root first, then -1. ``count``: int32 ``[B]``, how many, the root
    included, which is how many tokens the step emits. ``next_token``: int64 ``[B]``, the root of the next step. An
    absent sequence has no node, count 0 and next token -1.
    """

    nodes: Tensor
    count: Tensor  # type: ignore[assignment]  # the field hides tuple.count
    next_token: Tensor


def medusa_draft(
    hidden: Tensor,
    root: Tensor,
    depths: Tensor,
    ranks: Tensor,
    weight: Tensor,
    bias: Tensor,
    projections: Tensor | None,
    roots: Tensor | None,
    embedding: Tensor | None,
    lm_head: Tensor,
    vocabulary: Tensor | None = None,
) -> Tensor:
    """The tokens of a draft tree from Medusa heads (arXiv 2401.10774): node i of depth m gets the token that head m
    (from 1) ranks ``ranks[i]``-th (from 0; of equal logits the lower index first).

    Head k turns ``z = hidden`` by ``z + silu(W z + b)`` for each layer, then to ``P z`` where there are
    ``projections``, then adds ``R e`` of the root's embedding e where there are ``roots``. Each step is rounded to the
    dtype once. Its logits are those of ``lm_head``.

    Args:
        hidden: ``[B, d]``, float32, bfloat16, float16 or float64: what the target read the root's token from.
        root: int64 ``[B]``, the token of each tree's root; a negative one is an absent sequence.
        depths, ranks: int32 ``[T]``, one tree for all sequences; depth 0 for node 0 alone, the root, whose rank is not
            looked at; others in ``[1, K]`` and ``[0, V)``.
        weight: ``[layers, K, d, d]``; bias: ``[layers, K, d]``; projections, roots: ``[K, d, d]``.
        embedding: ``[tokens, d]``, exactly where there are ``roots``.
        lm_head: ``[V, d]`` shared by the heads, or ``[K, V, d]``.
        vocabulary: int64 ``[V]``, the token that each row of lm_head stands for, where that is not its index.

    Returns:
        int64 ``[B, T]``, the root's token first, -1 for absent sequences. The same for a sequence whatever the batch.
        No gradient. Logits with NaN or inf are an error.
    """
    arguments = hidden, root, depths, ranks, weight, bias, projections, roots, embedding, lm_head, vocabulary
    if dispatches(hidden, weight, bias, projections, roots, embedding, lm_head):
        return _medusa_draft(*arguments)
    with BelowAutograd():
        return _medusa_draft(*arguments)


def pack_ancestors(parents: Tensor) -> tuple[Tensor, Tensor]:
    """What each node of a token tree may see.

    Args:
        parents: int32 ``[B, T]``: -1 for the root, which is node 0; -2 for padding; parents before children. A row of
            padding alone is an absent sequence.

    Returns:
        ancestors int64 ``[B, T, ceil(T / 64)]``, bit ``j & 63`` (least significant first) of word ``j >> 6`` for each
        ancestor j of a node and for itself; depths int32 ``[B, T]``, 0 for the root. Padding sees itself, depth 0.
    """
    if dispatches(parents):
        return _pack_ancestors(parents)
    with BelowAutograd():
        return _pack_ancestors(parents)


def verify_greedy(parents: Tensor, draft_tokens: Tensor, target_tokens: Tensor) -> Accepted:
    """Accepts drafts that are what greedy decoding says: descends to the first child with the target's token.

    Args:
        parents: int32 ``[B or 1, T]``, as in :func:`pack_ancestors`; one row serves all sequences.
        draft_tokens: int64 ``[B, T]``, the token of each node; the root's and those of padding are not looked at, and
            a negative one is never accepted.
        target_tokens: int64 ``[B, T]``, the target's next token after each node: ties to the lowest id. Or its logits,
            floating ``[B, T, V]``, whose first maximum that is; NaN is an error.
    """
    if dispatches(parents, target_tokens):
        return Accepted(*_verify_greedy(parents, draft_tokens, target_tokens))
    with BelowAutograd():
        return Accepted(*_verify_greedy(parents, draft_tokens, target_tokens))


def verify_rejection(
    parents: Tensor,
    draft_tokens: Tensor,
    draft_probs: Tensor | None,
    target_probs: Tensor,
    uniforms: Tensor | None = None,
    *,
    siblings: Literal["iid", "without_replacement", "deterministic"],
    generator: torch.Generator | None = None,
) -> Accepted:
    """Speculative sampling over a tree: what is emitted has the target's law, whatever was drafted (arXiv 2211.17192;
    siblings in rounds as in arXiv 2305.09781 and, without replacement, arXiv 2402.14160).

    Siblings are tried in the order of their nodes. ``iid``: each was drawn from its own row of ``draft_probs``,
    whatever the others are; equal ones are rounds of their own. ``without_replacement``: drawn one after the other
    from the row of the first, without those before. ``deterministic``: any set chosen without chance, such as the
    likeliest tokens or a copied text; of equal ones the first counts.

    Args:
        parents: int32 ``[B or 1, T]``, as in :func:`pack_ancestors`.
        draft_tokens: int64 ``[B, T]``, in ``[0, V)`` but at the root and padding.
        draft_probs: float32 ``[B, T, V]``, the law each node was drawn from, all processing applied; None exactly
            where deterministic. Rows at the root and padding are not read.
        target_probs: float32 ``[B, T, V]``, the law after each node, all processing applied, at leaves too. Rows of
            both are normalised in float64.
        uniforms: float64 ``[B, T + 1]`` in ``[0, 1)``: entry i is the accept test of node i, or, where deterministic,
            the draw made standing at node i; the last is the final draw (unless deterministic), by inverse CDF in id
            order. None: drawn from ``generator``.
    """
    if uniforms is None:
        shape = (*draft_tokens.shape[:-1], draft_tokens.shape[-1] + 1)
        uniforms = torch.rand(shape, dtype=torch.float64, device=draft_tokens.device, generator=generator)
    if dispatches(draft_probs, target_probs, uniforms):
        results = _verify_rejection(parents, draft_tokens, draft_probs, target_probs, uniforms, siblings=siblings)
    else:
        with BelowAutograd():
            results = _verify_rejection(parents, draft_tokens, draft_probs, target_probs, uniforms, siblings=siblings)
    return Accepted(*results)


def verify_typical(
    parents: Tensor,
    draft_tokens: Tensor,
    target_probs: Tensor,
    *,
    epsilon: float = 0.09,
    delta: float = 0.3,
    uniforms: Tensor | None = None,
) -> Accepted:
    """Accepts drafts that are typical of the target (arXiv 2401.10774). Its output does **not** have the target's law.

    A node with token x under a parent with law p is typical if ``p(x) > min(epsilon, delta * exp(-H))`` with
    ``H = -sum p log(p + 1e-5)``. The longest path of typical nodes is accepted; of equals the one with the largest
    sum of ``log p(x)``, then the one whose last node comes first.

    Args:
        parents, draft_tokens, target_probs: as in :func:`verify_rejection`.
        epsilon, delta: in ``[0, 1]``.
        uniforms: float64 ``[B]`` in ``[0, 1)``, which draw the next token by inverse CDF in id order from the law
            after the last accepted node; None: its likeliest token, ties to the lowest id.
    """
    options = {"epsilon": epsilon, "delta": delta, "uniforms": uniforms}
    if dispatches(target_probs, uniforms):
        return Accepted(*_verify_typical(parents, draft_tokens, target_probs, **options))
    with BelowAutograd():
        return Accepted(*_verify_typical(parents, draft_tokens, target_probs, **options))
