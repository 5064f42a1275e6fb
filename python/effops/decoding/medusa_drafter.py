"""Drafts of Medusa heads: a fixed tree of the likeliest tokens of each head (arXiv 2401.10774)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from effops import ops, reference
from effops.decoding.draft import Draft, DraftContext, Drafter
from effops.decoding.medusa import MedusaHeads
from effops.decoding.tree import TokenTree
from effops.models import Llama
from effops.ops.packed_weight import PackedWeight


class MedusaDrafter(Drafter):
    """The tokens of a tree of ranks: a node of depth m and rank r is head m's r-th choice (m from 1, r from 0).

    ``tree`` comes from ``TokenTree.from_paths`` or ``TokenTree.optimal`` over the heads' acceptance table; None: the
    best tree of 16 nodes by that table. The heads may have another dtype than the model: bfloat16 ones draft faster.
    ``vocabulary`` names the tokens that are ever drafted, as a rule the most frequent ones: the LM head that the heads
    share is most of the cost of a draft (FR-Spec, arXiv 2502.14856).
    """

    needs_hidden = True

    def __init__(
        self, heads: MedusaHeads, tree: TokenTree | None = None, *, vocabulary: Sequence[int] | None = None
    ) -> None:
        if tree is None:
            if heads.acceptance is None:
                raise ValueError("MedusaDrafter: tree: expected one for heads without an acceptance table, got None")
            tree = TokenTree.optimal(heads.acceptance, {16: 1.0})
        if tree.max_depth > heads.num_heads:
            raise ValueError(
                f"MedusaDrafter: tree: expected a depth of at most {heads.num_heads} heads, got {tree.max_depth}"
            )
        if vocabulary is not None and heads.lm_heads is not None:
            raise ValueError("MedusaDrafter: vocabulary: expected None for heads with LM heads of their own")
        self.heads, self.tree, self.max_nodes = heads, tree, len(tree)
        self._vocabulary = None if vocabulary is None else torch.tensor(list(vocabulary), dtype=torch.int64)
        self._cut: dict[int, tuple[TokenTree, torch.Tensor, torch.Tensor]] = {}

    def begin(self, model: Llama, batch_size: int) -> None:
        self._embedding = None
        if self.heads.roots is not None:
            self._embedding = model.embed_tokens.weight.detach().to(self.heads.weight.dtype)
        if model.config.hidden_size != self.heads.hidden_size:
            raise ValueError(
                f"MedusaDrafter: heads: expected the target's width {model.config.hidden_size}, "
                f"got {self.heads.hidden_size}"
            )
        heads = self.heads
        weight, bias = heads.weight.detach(), heads.bias.detach()
        further = (None if x is None else x.detach() for x in (heads.projections, heads.roots))
        self._weights = (weight, bias, *further)
        if self.heads.lm_heads is not None:
            self._lm_head = self.heads.lm_heads.detach()
            return
        head: Any = model.lm_head.weight
        weight = head.dequantize() if isinstance(head, PackedWeight) else head.detach()
        if self._vocabulary is None and self._embedding is not None and model.config.tie_word_embeddings:
            self._lm_head = self._embedding
            return
        rows = weight if self._vocabulary is None else weight[self._vocabulary]
        self._lm_head = rows.to(self.heads.weight.dtype)

    def propose(self, context: DraftContext) -> list[Draft | None]:
        deepest = min(max(context.budgets), self.tree.max_depth)
        if deepest < 1 or context.hidden is None:
            return [None] * len(context.budgets)
        tree, depths, ranks = self._tree_of(deepest)
        hidden = context.hidden
        if hidden.dtype != self._lm_head.dtype:
            hidden = hidden.to(self._lm_head.dtype)
        root = context.roots
        if root is None:
            root = torch.tensor([known[-1] for known in context.tokens], device=hidden.device)
        source = ops if hidden.device.type == "cpu" else reference
        tokens = source.medusa_draft(
            hidden, root, depths, ranks, *self._weights, self._embedding, self._lm_head, self._vocabulary
        )
        return [
            Draft(own[1:], tree) if budget > 0 else None
            for own, budget in zip(tokens.tolist(), context.budgets, strict=True)
        ]

    def _tree_of(self, depth: int) -> tuple[TokenTree, torch.Tensor, torch.Tensor]:
        """The tree down to a depth, and the depths and ranks of its nodes."""
        if depth not in self._cut:
            tree = self.tree if depth == self.tree.max_depth else self.tree.truncated(max_depth=depth)
            depths, ranks = (torch.tensor(list(x), dtype=torch.int32) for x in (tree.depths, tree.ranks))
            self._cut[depth] = tree, depths, ranks.clamp(min=0)
        return self._cut[depth]
