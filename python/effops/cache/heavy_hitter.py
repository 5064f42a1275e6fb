"""The evicting KV cache: a fixed number of entries a KV head, each with tokens of its own, those that have had the most
attention (H2O, arXiv 2306.14048) or that the end of the prompt attends to (SnapKV, arXiv 2404.14469)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from effops.cache.base import AcceptedNodes, Step, TreeNodes
from effops.cache.evicting_layer import EvictingStep, Eviction, HeavyHitterLayer, Policy
from effops.cache.kept import Pooling
from effops.cache.memory import cache_memory
from effops.cache.plan import Lengths


class HeavyHitterKVCache(Lengths):
    """A cache of at most ``budget`` entries a KV head, whatever the length of a sequence. The ``recent`` newest and the
    ``num_sinks`` first tokens always stay; keys keep the rotation of their position.

    - ``policy="h2o"``: entries gather the attention that they get from every query. In a pass of one token a sequence
      that finds all slots taken, the entry with the least makes room before the token attends (``append_evicting``); a
      pass of several tokens attends to all entries and to its own tokens, and then the heaviest stay.
    - ``policy="snapkv"``: a pass of several tokens, the prompt, attends in the same way, and then those entries stay
      that its last ``recent`` queries attend to most, after pooling along positions. Passes of one token are plain
      appends, for which there are ``max_new_tokens`` more slots.

    A prompt may be longer than the budget. In several passes it attends to what the passes before have left. Steps over
    trees are refused, and a rollback where it would need entries or masses that are gone. A pass that breaks off after
    it has evicted leaves a cache that has to be reset; one that breaks off before that may leave masses that it added.

    Args:
        capacity: tokens that a sequence may have in all.
        budget: at least ``num_sinks + recent``; more than the capacity is the capacity.
        recent: tokens that stay; SnapKV's observation window.
        pooling, kernel_size: SnapKV's, over an odd number of neighbours with zeros beyond the ends (``"avg"``) or
            without (``"max"``).
        max_new_tokens: SnapKV's.

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
        budget: int,
        recent: int,
        num_sinks: int = 4,
        policy: Policy = "h2o",
        pooling: Pooling = "avg",
        kernel_size: int = 5,
        max_new_tokens: int = 256,
        v_head_dim: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        if policy not in ("h2o", "snapkv"):
            raise self._error("policy", "h2o or snapkv", repr(policy))
        if pooling not in ("avg", "max"):
            raise self._error("pooling", "avg or max", repr(pooling))
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise self._error("kernel_size", "an odd number of 1 or more", kernel_size)
        if recent < 1 or num_sinks < 0 or budget < num_sinks + recent:
            least = f"num_sinks + recent = {num_sinks} + {recent} or more, recent 1 or more"
            raise self._error("budget", least, budget)
        if max_new_tokens < 0:
            raise self._error("max_new_tokens", "0 or more", max_new_tokens)
        self.eviction = Eviction(policy, min(budget, capacity), recent, num_sinks, pooling, kernel_size)
        self.slots = min(capacity, self.eviction.budget + (max_new_tokens if policy == "snapkv" else 0))
        shape = (num_layers, batch_size, num_kv_heads, self.slots)
        with torch.inference_mode(False):  # usable both inside and outside of inference mode
            self._k = cache_memory(*shape, head_dim, dtype=dtype, device=device)
            self._v = cache_memory(*shape, v_head_dim or head_dim, dtype=dtype, device=device)
            masses = torch.float64 if dtype == torch.float64 else torch.float32
            self._mass = torch.zeros(shape, dtype=masses, device=device)
            self._positions = torch.full(shape, -1, dtype=torch.int32, device=device)
        super().__init__(batch_size, capacity, self._k.device)
        self.layers = [
            HeavyHitterLayer(k.transpose(1, 2), v.transpose(1, 2), mass, positions, self.eviction)
            for k, v, mass, positions in zip(self._k, self._v, self._mass, self._positions, strict=True)
        ]
        self.held = [0] * batch_size
        self._fixed = [0] * batch_size  # tokens up to here cannot be forgotten one by one
        self._open: EvictingStep | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of keys, values, masses and positions."""
        return sum(x.nbytes for x in (self._k, self._v, self._mass, self._positions))

    def plan(self, tokens: int, lengths: Sequence[int] | None = None, tree: TreeNodes | None = None) -> EvictingStep:
        if tree is not None:
            raise self._error("tree", "None (tokens that a draft evicts would not come back)", "a tree")
        self._close()
        base = self._plan(tokens, lengths, None)
        new = [after - before for before, after in zip(self.lengths, base.lengths, strict=True)]
        entries = [held + n for held, n in zip(self.held, new, strict=True)]
        most = max((e for e, n in zip(entries, new, strict=True) if n), default=0)
        budget, evicts_one = self.eviction.budget, self.eviction.policy == "h2o"
        compresses = tokens > 1 and most > budget
        if not compresses and most > self.slots and not evicts_one:
            raise self._error("tokens", f"at most {self.slots} entries a sequence", most)
        attended = entries if compresses else [min(e, self.slots) for e in entries]
        held = [min(e, budget) if n else e for e, n in zip(entries, new, strict=True)] if compresses else attended
        whole = entries == base.lengths and attended == entries  # nothing has been evicted
        slots, kv_lens = (base.slots, base.kv_lens) if whole else self._places(base, self.held, attended)
        self._open = EvictingStep(
            base.positions, slots, kv_lens, base.lengths, max(attended, default=0), base.span,
            new_positions=base.slots, padding=None if lengths is None else base.slots < 0, token_lens=base.kv_lens,
            new=new, held_before=self.held, held=held, compresses=compresses, evicts=held != entries,
        )  # fmt: skip
        return self._open

    def _close(self, everything: bool = False) -> None:
        """After a pass that broke off: forgets its tokens, where that is possible; with ``everything``, all tokens."""
        if self._open is None:
            return
        written = any(layer.written for layer in self.layers)
        if written and self._open.evicts and not everything:
            raise self._error("plan", "a reset, for a pass broke off when it had evicted entries", "another step")
        if written:
            for row, length in enumerate(self.lengths):
                self._forget(row, 0 if everything else length)
        self._done()

    def _done(self) -> None:
        self._open = None
        for layer in self.layers:
            layer.close()

    def advance(self, step: Step) -> None:
        assert isinstance(step, EvictingStep)
        h2o = self.eviction.policy == "h2o"
        self._fixed = [
            after if h2o or (step.compresses and n) else before
            for after, before, n in zip(step.lengths, self._fixed, step.new, strict=True)
        ]
        self.lengths, self._kv_lens, self.held = step.lengths, step.token_lens, step.held
        self._done()

    def commit(self, accepted: AcceptedNodes) -> None:
        raise self._error("accepted", "no call: steps over trees are refused", "one")

    def rollback(self, lengths: Sequence[int]) -> None:
        """To the present length, to 0, or with SnapKV to any length since the last pass that was compressed."""
        after = list(lengths)
        if any(0 < n < min(m, least) for n, m, least in zip(after, self.lengths, self._fixed, strict=False)):
            expected = f"0, the present length or, where that is more, a number from {self._fixed} on"
            raise self._error("lengths", f"{expected} (what was evicted, or added to masses, stays so)", after)
        self._close(everything=not any(after))
        before = self.lengths
        self._shorten(after)
        self.held = [h - (m - n) if n else 0 for h, m, n in zip(self.held, before, after, strict=True)]
        self._fixed = [min(n, least) for n, least in zip(after, self._fixed, strict=True)]
        for row, (m, n) in enumerate(zip(before, after, strict=True)):
            if n < m:
                self._forget(row, n)

    def _forget(self, row: int, length: int) -> None:
        """Frees the entries of a sequence's tokens from ``length`` on, in all layers."""
        own = self._positions[:, row]
        own.masked_fill_(own >= length, -1)

    def reorder(self, rows: Sequence[int]) -> None:
        lengths = self._reordered(rows)
        self._close()
        chosen = list(rows)
        self.held, self._fixed = ([x[r] for r in chosen] for x in (self.held, self._fixed))
        longest = max(self.held, default=0)
        with torch.inference_mode(self._k.is_inference()), torch.no_grad():
            for memory in (self._k, self._v):
                memory[:, :, :, :longest] = memory[:, chosen, :, :longest]
            self._mass.copy_(self._mass[:, chosen])
            self._positions.copy_(self._positions[:, chosen])
        self._set_lengths(lengths)

    def reset(self) -> None:
        self.rollback([0] * self.batch_size)
