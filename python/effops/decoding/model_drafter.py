"""Drafts of a small model with the same vocabulary: two-model speculative decoding (arXiv 2211.17192)."""

from __future__ import annotations

import torch
from torch import Tensor

from effops.decoding.draft import Draft, DraftContext, Drafter
from effops.models import Llama


class ModelDrafter(Drafter):
    """Chains of ``length`` tokens of a draft model: its likeliest where decoding is greedy, else drawn as the target's
    are, from the model's own law, which verification needs.

    The model keeps a cache of its own, which follows what was accepted.
    """

    def __init__(self, model: Llama, length: int = 4) -> None:
        if length < 1:
            raise ValueError(f"ModelDrafter: length: expected at least 1, got {length}")
        self.model, self.length = model, length
        self.max_nodes = length + 1

    def begin(self, model: Llama, batch_size: int) -> None:
        if model.config.vocab_size != self.model.config.vocab_size:
            raise ValueError(
                f"ModelDrafter: model: expected the target's vocabulary of {model.config.vocab_size}, "
                f"got {self.model.config.vocab_size}"
            )
        self._context = self.model.config.context_length
        self._cache = self.model.new_cache(batch_size, self._context)
        self._held: list[list[int]] = [[] for _ in range(batch_size)]  # the tokens in the cache

    def propose(self, context: DraftContext) -> list[Draft | None]:
        lengths = [
            min(self.length, budget, self._context - len(tokens))
            for tokens, budget in zip(context.tokens, context.budgets, strict=True)
        ]
        deepest = max(lengths)
        if deepest < 1:
            return [None] * len(lengths)
        logits = self._catch_up(context.tokens, [n > 0 for n in lengths])
        greedy = context.sampler.temperature == 0
        drafted: list[list[int]] = [[] for _ in lengths]
        laws: list[Tensor] = []
        for depth in range(deepest):
            if greedy:
                tokens = context.sampler(logits)
            else:
                laws.append(context.sampler.probabilities(logits))
                tokens = context.sampler(logits)
            chosen = tokens.tolist()
            going = [depth < n for n in lengths]
            for own, token, on in zip(drafted, chosen, going, strict=True):
                if on:
                    own.append(token)
            if depth + 1 < deepest:
                going = [depth + 1 < n for n in lengths]
                for held, token, on in zip(self._held, chosen, going, strict=True):
                    if on:
                        held.append(token)
                on_all = None if all(going) else list(map(int, going))
                logits = self.model.forward(tokens[:, None], self._cache, lengths=on_all)[:, -1]
        return [
            Draft(own, probs=None if greedy else torch.stack([law[row] for law in laws[: len(own)]])) if own else None
            for row, own in enumerate(drafted)
        ]

    def _catch_up(self, known: list[list[int]], runs: list[bool]) -> Tensor:
        """Brings the cache to all known tokens of the sequences that run; logits [B,V] after the last ones."""
        new: list[list[int]] = []
        for row, (held, tokens, on) in enumerate(zip(self._held, known, runs, strict=True)):
            if not on:
                new.append([])
                continue
            common = min(len(held), len(tokens) - 1)
            while held[:common] != tokens[:common]:
                common -= 1
            self._held[row] = list(tokens)
            new.append(tokens[common:])
        self._cache.rollback([
            min(length, len(tokens) - len(own)) if on else length
            for length, tokens, own, on in zip(self._cache.lengths, known, new, runs, strict=True)
        ])  # fmt: skip
        width = max(map(len, new))
        padded = torch.tensor([[0] * (width - len(own)) + own for own in new])
        lengths = None if all(len(own) == width for own in new) else [len(own) for own in new]
        return self.model.forward(padded, self._cache, lengths=lengths, logits_to_keep=1)[:, -1]
