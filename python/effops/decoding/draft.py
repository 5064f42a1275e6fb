"""What a drafter is: the one interface between ``generate`` and whoever guesses the next tokens."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from torch import Tensor

from effops.decoding.sampler import Sampler
from effops.decoding.tree import TokenTree

if TYPE_CHECKING:
    from effops.models import Llama

Siblings = Literal["iid", "without_replacement"]


@dataclass(slots=True)
class Draft:
    """A guess at what follows one sequence.

    Attributes:
        tokens: one for each node of the tree below its root, which is the sequence's last token: nodes 1, 2, ...
        tree: None is a chain.
        probs: float32 ``[len(tokens), V]``, the law that each token was drawn from; None where they were chosen without
            chance, as copied text and likeliest tokens are. A wrong law makes sampling lossy, nothing else does.
        siblings: how siblings were drawn from ``probs``, as in ``ops.verify_rejection``.
    """

    tokens: Sequence[int]
    tree: TokenTree | None = None
    probs: Tensor | None = None
    siblings: Siblings = "iid"


@dataclass(slots=True)
class DraftContext:
    """What is known before a step.

    Attributes:
        tokens: of each sequence, the prompt and everything emitted. Lists of ``generate``'s own: not to be changed.
        budgets: the depth of the deepest draft that could still be used; 0 where a draft is of no use.
        hidden: ``[B, d]``, the normed last hidden state whose logits gave each sequence's last token; for drafters
            that ``needs_hidden``.
        sampler: how tokens are drawn.
        roots: int64 ``[B]``, the last token of each sequence again; negative or anything where it has ended.
    """

    tokens: list[list[int]]
    budgets: list[int]
    hidden: Tensor | None
    sampler: Sampler
    roots: Tensor | None = None


class Drafter(abc.ABC):
    """Guesses tokens for the target model to verify. Subclasses implement :meth:`propose`.

    Guesses may be wrong, missing or too many: that costs speed, never a token of the output. Nodes that cannot be used
    are dropped: tokens that do not exist, what is deeper than the budget, what is beyond ``max_nodes``.
    """

    max_nodes = 64  # nodes of the largest tree, its root included
    needs_hidden = False

    def begin(self, model: Llama, batch_size: int) -> None:  # noqa: B027  (nothing to do is an ordinary beginning)
        """Called by ``generate`` before the first step of ``batch_size`` new sequences."""

    @abc.abstractmethod
    def propose(self, context: DraftContext) -> Sequence[Draft | None]:
        """A draft for each sequence, or None."""
