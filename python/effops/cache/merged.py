"""The merging KV cache: a prompt is compressed once, its evicted entries are merged into those that stay (LOOK-M,
arXiv 2406.18139)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from effops.cache.base import AcceptedNodes, Step, TreeNodes
from effops.cache.memory import cache_memory
from effops.cache.merged_layer import MergedLayer, MergedStep
from effops.cache.plan import Lengths
from effops.ops.merging import Merging


class MergedKVCache(Lengths):
    """A cache that looks once: the first pass of a sequence, its prompt, attends to all of its tokens; then a part of
    them stays and takes in the others (:func:`effops.ops.merge_kv`). Later passes are plain appends of any size. Keys
    keep the rotation of their position, and queries stand at their own.

    Of a prompt of n tokens there stay, in each KV head, the newest ``M = recent``, and of the others those that
    are protected and then the heaviest, by the attention that they got from all of the prompt's queries, up to
    ``N = heavy`` or all protected ones where these are more: ``M + max(N, protected)`` in all heads of a sequence.
    Protected are the tokens that :meth:`protect` names (LOOK-M: those of text, not of images) and the ``num_sinks``
    first (which have more queries behind them, so that their masses say less). A prompt of at most N + M tokens stays
    whole. Steps over trees are refused, and rollbacks into a compressed prompt.

    Args:
        capacity: tokens that a sequence may have in all.
        slots: entries of a KV head, for what stays of a prompt and the tokens after it; None: ``capacity``.
        heavy, recent: numbers of tokens, or as a float the share of the prompt, rounded down; recent is at least 1.
        merging, least_similarity: as in :func:`effops.ops.merge_kv`; ``"none"`` evicts without merging.

    Raises:
        ValueError: options that do not fit. So do steps for which there is no room.
    """

    def __init__(
        self,
        num_layers: int,
        batch_size: int,
        capacity: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        slots: int | None = None,
        heavy: int | float = 0.1,
        recent: int | float = 0.1,
        num_sinks: int = 4,
        merging: Merging = "pivotal",
        least_similarity: float | None = None,
        v_head_dim: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        for name, share, least in (("heavy", heavy, 0), ("recent", recent, 1)):
            good = 0 <= share <= 1 if isinstance(share, float) else share >= least
            if not good:
                raise self._error(name, f"a share in [0, 1] or a number of {least} or more", share)
        if merging not in ("none", "averaged", "pivotal", "weighted"):
            raise self._error("merging", "none, averaged, pivotal or weighted", repr(merging))
        if least_similarity is not None and math.isnan(least_similarity):
            raise self._error("least_similarity", "a number or None", least_similarity)
        if num_sinks < 0:
            raise self._error("num_sinks", "0 or more", num_sinks)
        if slots is not None and slots < 0:
            raise self._error("slots", "0 or more", slots)
        self.slots = capacity if slots is None else min(slots, capacity)
        self._heavy, self._recent, self._num_sinks = heavy, recent, num_sinks
        shape = (num_layers, batch_size, num_kv_heads, self.slots)
        with torch.inference_mode(False):  # usable both inside and outside of inference mode
            self._k = cache_memory(*shape, head_dim, dtype=dtype, device=device)
            self._v = cache_memory(*shape, v_head_dim or head_dim, dtype=dtype, device=device)
        super().__init__(batch_size, capacity, self._k.device)
        self.layers = [
            MergedLayer(k.transpose(1, 2), v.transpose(1, 2), merging=merging, num_sinks=num_sinks,
                        least_similarity=least_similarity)
            for k, v in zip(self._k, self._v, strict=True)
        ]  # fmt: skip
        self.held = [0] * batch_size
        self._fixed = [0] * batch_size  # tokens of a prompt that was compressed
        self._protected: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        return self._k.nbytes + self._v.nbytes

    def protect(self, tokens: Tensor | None) -> None:
        """Says which tokens of the next pass that begins a sequence stay whatever they weigh: bool [B,T], padded as the
        tokens of that pass are; None: none."""
        if tokens is not None and (tokens.dtype != torch.bool or tokens.dim() != 2 or len(tokens) != self.batch_size):
            raise self._error("tokens", f"bool [{self.batch_size}, T]", f"{tokens.dtype} {list(tokens.shape)}")
        self._protected = tokens

    def plan(self, tokens: int, lengths: Sequence[int] | None = None, tree: TreeNodes | None = None) -> MergedStep:
        if tree is not None:
            raise self._error("tree", "None (a compressed prompt has no room for nodes that do not stay)", "a tree")
        for layer in self.layers:
            layer.close()
        base = self._plan(tokens, lengths, None)
        new = [after - before for before, after in zip(self.lengths, base.lengths, strict=True)]
        begins = [before == 0 and n > 0 for before, n in zip(self.lengths, new, strict=True)]
        protected = self._protected if any(begins) else None
        if protected is not None and protected.shape[1] != tokens:
            raise self._error("protected", f"a mask of the pass's {tokens} tokens", list(protected.shape))
        attended = [held + n for held, n in zip(self.held, new, strict=True)]
        held, recent = list(attended), [0] * self.batch_size
        for b, n in enumerate(new):
            if begins[b]:
                recent[b] = max(1, self._count(self._recent, n))
                held[b] = self._stay(n, recent[b], None if protected is None else protected[b])
        most = max((h for h, n in zip(held, new, strict=True) if n), default=0)
        if most > self.slots:
            raise self._error("tokens", f"at most {self.slots} entries a sequence", most)
        whole = attended == base.lengths
        slots, kv_lens = (base.slots, base.kv_lens) if whole else self._places(base, self.held, attended)
        return MergedStep(
            base.positions, slots, kv_lens, base.lengths, max(attended, default=0), base.span,
            token_lens=base.kv_lens, padding=None if lengths is None else base.slots < 0, new=new, attended=attended,
            held=held, recent=recent, protected=protected,
        )  # fmt: skip

    @staticmethod
    def _count(share: int | float, tokens: int) -> int:
        return int(share * tokens) if isinstance(share, float) else share

    def _stay(self, tokens: int, recent: int, protected: Tensor | None) -> int:
        """How many entries of a prompt stay."""
        heavy = self._count(self._heavy, tokens)
        if tokens <= heavy + recent:
            return tokens
        others = tokens - recent
        stays = torch.zeros(tokens, dtype=torch.bool) if protected is None else protected[-tokens:].clone()
        stays[: self._num_sinks] = True
        return recent + max(heavy, int(stays[:others].sum()))

    def advance(self, step: Step) -> None:
        assert isinstance(step, MergedStep)
        prompts = zip(step.held, step.attended, step.lengths, self._fixed, strict=True)
        self._fixed = [length if held < attended else before for held, attended, length, before in prompts]
        if any(step.recent):
            self._protected = None
        self.lengths, self._kv_lens, self.held = step.lengths, step.token_lens, step.held

    def commit(self, accepted: AcceptedNodes) -> None:
        raise self._error("accepted", "no call: steps over trees are refused", "one")

    def rollback(self, lengths: Sequence[int]) -> None:
        """To any length from a compressed prompt's on, or to 0."""
        after = list(lengths)
        if any(0 < n < min(m, least) for n, m, least in zip(after, self.lengths, self._fixed, strict=False)):
            raise self._error("lengths", f"0 or numbers from {self._fixed} on (what was merged stays so)", after)
        before = self.lengths
        self._shorten(after)
        self.held = [h - (m - n) if n else 0 for h, m, n in zip(self.held, before, after, strict=True)]
        self._fixed = [least if n else 0 for n, least in zip(after, self._fixed, strict=True)]

    def reorder(self, rows: Sequence[int]) -> None:
        lengths = self._reordered(rows)
        chosen = list(rows)
        self.held, self._fixed = ([x[r] for r in chosen] for x in (self.held, self._fixed))
        longest = max(self.held, default=0)
        with torch.inference_mode(self._k.is_inference()), torch.no_grad():
            for memory in (self._k, self._v):
                memory[:, :, :, :longest] = memory[:, chosen, :, :longest]
        self._set_lengths(lengths)

    def reset(self) -> None:
        self.rollback([0] * self.batch_size)
