"""A decoder's weights as one op takes them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from operator import is_
from typing import Any

from torch import nn

from effops.nn import DecoderLayer, RMSNorm
from effops.nn.packed import PackedLinear, Place, places_of


class DecoderWeights:
    """What ``ops.decoder`` takes from embedding to LM head, of a model with ``embed_tokens``, ``layers``, ``norm`` and
    ``lm_head``.

    Weights are looked up in the modules' dictionaries on every call, but where they are is found once, and again when
    a module, a bias that was not there, or a number in between has been replaced.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = model._modules
        self._links: list[tuple[dict[str, Any], str, Any]] = []
        self._linked: tuple[tuple[Any, ...], ...] = ()  # the links, seen as columns
        self._places: list[Place | list[Place]] | None = None
        self._pins, self._pinned = 0, False
        self._last: list[Any] | None = None
        self.norm_eps, self.windows = 0.0, [0]

    def get(self) -> list[Any] | None:
        """The embedding, ten lists of one tensor a layer, the last norm and the LM head; None where the model has a
        part that the op does not know."""
        if self._pinned:
            return self._last
        layers: Any = self._modules["layers"]
        same = self._places is not None and len(layers) == len(self.windows)
        if not (same and all(map(is_, map(dict.get, *self._linked[:2]), self._linked[2]))):
            self._links, self._places = [], None
            self._places = self._find(list(layers))
            self._linked = tuple(zip(*self._links, strict=True))
        self._last = self._places and [
            place[0][place[1]] if isinstance(place, tuple) else [where[name] for where, name in place]
            for place in self._places
        ]
        self._pinned = self._pins > 0
        return self._last

    @contextmanager
    def pinned(self) -> Iterator[None]:
        """Within, weights are looked up once: nobody replaces one (writing into one is another matter)."""
        self._pins += 1
        try:
            yield
        finally:
            self._pins -= 1
            if not self._pins:
                self._pinned, self._last = False, None

    def _find(self, layers: Sequence[Any]) -> list[Place | list[Place]] | None:
        self.windows = [0] * len(layers)
        embedding, norm, lm_head = (self._link(self._modules, name) for name in ("embed_tokens", "norm", "lm_head"))
        head = places_of(lm_head)
        if not layers or head is None or not (type(embedding) is nn.Embedding and type(norm) is RMSNorm):
            return None
        self._link(norm.__dict__, "eps")
        self._link_packed(lm_head)
        if embedding.max_norm is not None or self._link(lm_head._parameters, "bias") is not None:
            return None
        self.norm_eps = norm.eps
        columns: list[list[Place]] = [[] for _ in range(10)]
        for i, layer in enumerate(layers):
            self._links.append((self._modules["layers"]._modules, str(i), layer))  # type: ignore[union-attr]
            places = self._find_layer(layer)
            if places is None:
                return None
            self.windows[i] = layer.self_attn.window or 0
            for column, (where, name) in zip(columns, places, strict=True):
                if where[name] is not None:
                    column.append((where, name))
                else:
                    self._links.append((where, name, None))
        if not all(len(column) in (0, len(layers)) for column in columns):
            return None
        return [(embedding._parameters, "weight"), *columns, (norm._parameters, "weight"), head[0]]

    def _find_layer(self, layer: Any) -> list[Place] | None:
        """Where the ten weights of a layer are."""
        if type(layer) is not DecoderLayer:
            return None
        attention, mlp = layer.self_attn, layer.mlp
        norms = layer.input_layernorm, layer.post_attention_layernorm
        for modules in (layer._modules, attention._modules, mlp._modules):
            for name in modules:
                self._link(modules, name)
        if layer._weights() is None or norms[0].eps != self.norm_eps:
            return None
        for where, name in ((norms[0].__dict__, "eps"), (norms[1].__dict__, "eps"), (attention.__dict__, "window"),
                            (attention.__dict__, "clip")):  # fmt: skip
            self._link(where, name)
        linears = attention.qkv_proj, attention.o_proj, mlp.gate_up_proj, mlp.down_proj
        qkv, o, gate_up, down = (places_of(linear) or [] for linear in linears)
        for linear in linears:
            self._link_packed(linear)
        first, second = ((norm._parameters, "weight") for norm in norms)
        return [first, *qkv, *o, second, *gate_up, *down]

    def _link_packed(self, linear: Any) -> None:
        """What makes a packed layer one that the op has not."""
        if isinstance(linear, PackedLinear):
            self._link(linear._buffers, "order")
            self._link(linear.__dict__, "activation")

    def _link(self, where: dict[str, Any], name: str) -> Any:
        """What is there, which has to stay there."""
        self._links.append((where, name, where[name]))
        return where[name]
