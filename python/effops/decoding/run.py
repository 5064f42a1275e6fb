"""One batch of sequences on its way: the prefill, plain steps, speculative steps."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from effops.cache import KVCache, OutOfPagesError
from effops.decoding.draft import Draft, DraftContext, Drafter
from effops.decoding.sampler import Sampler
from effops.decoding.speculation import Speculator, TreeBatch, room_of, verify
from effops.decoding.stats import GenerationStats
from effops.decoding.stop import StopStrings
from effops.models import Llama
from effops.ops import Accepted

Callback = Callable[[int, list[int], str], None]


@dataclass
class Row:
    """One sequence: what it has emitted and when it ends."""

    limit: int
    limit_reason: str
    pieces: Callable[[int], str] | None
    stops: StopStrings
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    reason: str = ""
    logits: list[Tensor] = field(default_factory=list)

    def push(self, token: int, stop_tokens: frozenset[int]) -> str:
        """Takes the next token; returns the text that became visible."""
        self.tokens.append(token)
        shown = ""
        if token in stop_tokens:
            self.reason = "stop"
        elif self.pieces is not None:
            shown, stopped = self.stops.push(self.pieces(token))
            self.reason = "stop" if stopped else ""
        if not self.reason and len(self.tokens) == self.limit:
            self.reason = self.limit_reason
        if self.reason:
            shown += self.stops.flush()
        self.text += shown
        return shown


class Run:
    """The steps of one ``generate`` call. ``known`` holds each sequence's prompt and what it has emitted."""

    def __init__(
        self,
        model: Llama,
        cache: KVCache,
        rows: list[Row],
        prompts: Sequence[Sequence[int]],
        sampler: Sampler,
        stop_tokens: frozenset[int],
        callback: Callback | None,
        keep_logits: bool,
    ) -> None:
        self.model, self.cache, self.rows, self.sampler = model, cache, rows, sampler
        self.known = [list(ids) for ids in prompts]
        self.stop_tokens, self.callback, self.keep_logits = stop_tokens, callback, keep_logits
        self.stats = GenerationStats(prompt_tokens=sum(map(len, prompts)))
        self.hidden: Tensor | None = None  # [B, d], what the last token of each sequence was drawn from
        self.roots: Tensor | None = None  # int64 [B], that token

    @property
    def running(self) -> int:
        return sum(not row.reason for row in self.rows)

    def _forward(
        self, tokens: Tensor, needs_hidden: bool, *, lengths: list[int] | None = None, batch: TreeBatch | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Logits of the last token of each sequence, or of all nodes of a batch of trees, and their hidden states."""
        tree, keep = (None, 1) if batch is None else (batch.nodes, None)
        if not needs_hidden:
            logits = self.model.forward(tokens, self.cache, lengths=lengths, tree=tree, logits_to_keep=keep)
            return logits, None
        if keep is None or tokens.shape[1] == 1:
            hidden, logits = self.model.step(tokens, self.cache, lengths=lengths, tree=tree)
            return logits, hidden
        hidden = self.model.hidden_states(tokens, self.cache, lengths=lengths, tree=tree, keep=keep)
        return self.model.logits(hidden), hidden

    def prefill(self, needs_hidden: bool = False) -> Tensor:
        """Reads the prompts, shorter ones padded on the left, and takes the first token of each: int64 [B]."""
        lengths = [len(ids) for ids in self.known]
        longest = max(lengths)
        padded = [[0] * (longest - len(ids)) + ids for ids in self.known]
        tokens = torch.tensor(padded, device=self.model.device)
        alike = min(lengths) == longest
        logits, hidden = self._forward(tokens, needs_hidden, lengths=None if alike else lengths)
        self.hidden = None if hidden is None else hidden[:, -1]
        return self._take(logits[:, -1])

    def _take(self, logits: Tensor) -> Tensor:
        """Draws every sequence's next token from logits [B,V] and hands it to those that still run."""
        drawn = self.roots = self.sampler(logits)
        for r, token in enumerate(drawn.tolist()):
            if not self.rows[r].reason:
                self._push(r, [token], logits[r : r + 1])
        return drawn

    def _push(self, r: int, tokens: list[int], logits: Tensor) -> int:
        """Emits tokens of a sequence until it ends; how many."""
        row, pushed, shown = self.rows[r], 0, ""
        while pushed < len(tokens) and not row.reason:
            shown += row.push(tokens[pushed], self.stop_tokens)
            pushed += 1
        if self.keep_logits:
            row.logits += logits[:pushed].float().unbind(0)
        self.known[r] += tokens[:pushed]
        self.stats.new_tokens += pushed
        if self.callback is not None:
            self.callback(r, tokens[:pushed], shown)
        return pushed

    def decode(self, drawn: Tensor) -> None:
        """Plain steps, one token each, after the tokens ``drawn`` int64 [B]."""
        while running := self.running:
            lengths = None if running == len(self.rows) else [int(not row.reason) for row in self.rows]
            logits = self.model.forward(drawn[:, None], self.cache, lengths=lengths)[:, -1]
            drawn = self._take(logits)
            self.stats.steps += 1
            self.stats.sequence_steps += running

    def speculate(self, drafter: Drafter) -> None:
        """Steps of as many tokens as the model accepts of the drafts."""
        speculator = Speculator(self.model.config.vocab_size, drafter.max_nodes)
        while running := self.running:
            begin = time.perf_counter()
            batch = self._draft(drafter, speculator)
            self.stats.draft_seconds += time.perf_counter() - begin
            if batch is None or not self._tree_step(batch, drafter.needs_hidden):
                self._plain_step(drafter.needs_hidden)
            self.stats.steps += 1
            self.stats.sequence_steps += running

    def _draft(self, drafter: Drafter, speculator: Speculator) -> TreeBatch | None:
        runs = [not row.reason for row in self.rows]
        budgets = [(row.limit - len(row.tokens) - 1) * on for row, on in zip(self.rows, runs, strict=True)]
        lengths = [n for n, on in zip(self.cache.lengths, runs, strict=True) if on]
        deepest = min(max(budgets), drafter.max_nodes - 1)
        # All nodes turn by one table of angles, which some kinds of rotary embedding choose by the length.
        if not self.model.rotary.one_table(min(lengths) + 1, max(lengths) + 1 + deepest):
            return None
        if deepest < 1:
            return None
        drafts = drafter.propose(DraftContext(self.known, budgets, self.hidden, self.sampler, self.roots))
        sequence = isinstance(drafts, Sequence) and len(drafts) == len(runs)
        if not sequence or not all(d is None or isinstance(d, Draft) for d in drafts):
            expected = f"a Draft or None for each of {len(runs)} sequences"
            raise ValueError(f"{type(drafter).__name__}: propose: expected {expected}, got {drafts}")
        room = room_of(self.cache.lengths, self.cache.capacity, runs)
        return speculator.batch([
            speculator.proposal(draft, known[-1], budget, room) if on else None
            for draft, known, budget, on in zip(drafts, self.known, budgets, runs, strict=True)
        ])  # fmt: skip

    def _plain_step(self, needs_hidden: bool) -> None:
        runs = [not row.reason for row in self.rows]
        tokens = torch.tensor([[known[-1]] for known in self.known], device=self.model.device)
        logits, hidden = self._forward(tokens, needs_hidden, lengths=None if all(runs) else list(map(int, runs)))
        before = [len(row.tokens) for row in self.rows]
        self._take(logits[:, -1])
        if hidden is not None:
            self.hidden = hidden[:, -1]
        self.stats.accepted_lengths.update(
            len(row.tokens) - n for row, n, on in zip(self.rows, before, runs, strict=True) if on
        )

    def _tree_step(self, batch: TreeBatch, needs_hidden: bool) -> bool:
        """Verifies the batch. False if a paged cache has no room for it; then nothing has changed."""
        try:
            logits, hidden = self._forward(batch.tokens, needs_hidden, batch=batch)
        except OutOfPagesError:
            return False
        accepted = verify(batch, logits, self.sampler)
        nodes, count, following = (x.tolist() for x in accepted)
        last, ended = [0] * len(nodes), False
        for r, proposal in enumerate(batch.proposals):
            if proposal is None:
                continue
            path = nodes[r][: count[r]]
            tokens = [proposal.tokens[n] for n in path[1:]] + [following[r]]
            pushed = self._push(r, tokens, logits[r, path] if self.keep_logits else logits[r])
            self.stats.draft_nodes += len(proposal.tokens) - 1
            self.stats.accepted_lengths[pushed] += 1
            last[r] = path[-1]
            if pushed < count[r]:  # the cache then holds what it would after plain steps
                nodes[r][pushed:] = [-1] * (len(nodes[r]) - pushed)
                count[r], ended = pushed, True
        if ended:
            kept = torch.tensor(nodes, dtype=torch.int32), torch.tensor(count, dtype=torch.int32)
            accepted = Accepted(*kept, accepted.next_token)
        self.cache.commit(accepted)
        self.roots = accepted.next_token
        if hidden is not None:
            self.hidden = hidden[torch.arange(len(last)), last] if len(last) > 1 else hidden[:, last[0]]
        return True
