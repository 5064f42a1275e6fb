"""Several drafters' guesses in one tree: what one does not know another may."""

from __future__ import annotations

from collections.abc import Sequence

from effops.decoding.draft import Draft, DraftContext, Drafter
from effops.decoding.tree import TokenTree
from effops.models import Llama


class MergedDrafter(Drafter):
    """The drafts of several drafters as one tree, in which equal beginnings are one path.

    Medusa heads guess something always, a copy only where the text repeats itself, but then several tokens deep:
    together they emit more tokens a step than either, on few nodes.

    Nodes come in the drafters' order, at most ``max_nodes`` with the root. Only drafts chosen without chance can be
    merged: where one has ``probs``, it is used alone.
    """

    def __init__(self, *drafters: Drafter, max_nodes: int | None = None) -> None:
        if not drafters:
            raise ValueError("MergedDrafter: drafters: expected one or more, got none")
        most = 1 + sum(drafter.max_nodes - 1 for drafter in drafters)
        if max_nodes is not None and max_nodes < 2:
            raise ValueError(f"MergedDrafter: max_nodes: expected at least 2, got {max_nodes}")
        self.drafters = drafters
        self.max_nodes = most if max_nodes is None else max_nodes
        self.needs_hidden = any(drafter.needs_hidden for drafter in drafters)
        self._trees: dict[tuple[int, ...], TokenTree] = {}  # one object a shape: steps are prepared once for each

    def begin(self, model: Llama, batch_size: int) -> None:
        for drafter in self.drafters:
            drafter.begin(model, batch_size)

    def propose(self, context: DraftContext) -> list[Draft | None]:
        drafts = [drafter.propose(context) for drafter in self.drafters]
        return [self._merge([draft for draft in row if draft is not None]) for row in zip(*drafts, strict=True)]

    def _merge(self, drafts: Sequence[Draft]) -> Draft | None:
        with_law = next((draft for draft in drafts if draft.probs is not None), None)
        if with_law is not None or len(drafts) < 2:
            return with_law or (drafts[0] if drafts else None)
        parents, tokens = [-1], list[int]()
        place: dict[tuple[int, int], int] = {}  # of a parent and a token: the node
        for draft in drafts:
            own = [0]  # where the draft's nodes are
            tree = None if draft.tree is None else draft.tree.parents
            for i, token in enumerate(draft.tokens if tree is None else draft.tokens[: len(tree) - 1]):
                parent = own[i] if tree is None else own[tree[i + 1]]
                node = place.get((parent, token))
                if node is None:
                    if len(parents) == self.max_nodes:
                        break
                    node = place[parent, token] = len(parents)
                    parents.append(parent)
                    tokens.append(token)
                own.append(node)
        shape = tuple(parents)
        if shape not in self._trees:
            if len(self._trees) >= 256:
                self._trees.clear()
            self._trees[shape] = TokenTree(parents)
        return Draft(tokens, self._trees[shape])
