"""The pre-norm decoder layer of the Llama family."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

from effops import ops
from effops.cache import DenseLayer, LayerCache, PagedLayer, Step
from effops.nn.attention import Attention, Rope
from effops.nn.basic import MLP, Linear, RMSNorm


class DecoderLayer(nn.Module):
    """x + attention(norm(x)), then + mlp(norm(·)); norms and additions happen in the projections' own calls.

    Over a dense or paged cache and without gradients the layer is one op, ``decoder_layer``, unless one of its parts
    was replaced; the bits are the same.
    """

    def __init__(
        self, self_attn: Attention, mlp: MLP, input_layernorm: RMSNorm, post_attention_layernorm: RMSNorm
    ) -> None:
        super().__init__()
        self.self_attn = self_attn
        self.mlp = mlp
        self.input_layernorm = input_layernorm
        self.post_attention_layernorm = post_attention_layernorm

    def forward(
        self,
        x: Tensor,
        rope: Rope,
        cache: LayerCache | None = None,
        step: Step | None = None,
        keep: int | None = None,
    ) -> Tensor:
        """x [B,T,d] to [B,T,d], or to [B,keep,d]: the last ``keep`` tokens, for which the others give only keys and
        values."""
        own: Any = self._modules
        if keep is None or keep >= x.shape[1]:
            if (
                (type(cache) is DenseLayer or type(cache) is PagedLayer)
                and step is not None
                and not torch.is_grad_enabled()
            ):
                weights = self._weights()
                if weights is not None and x.dtype is not torch.float64:
                    arguments: Any = (
                        *weights, *rope, cache.k, cache.v, step.slots, step.kv_lens, own["input_layernorm"].eps,
                        own["self_attn"].window or 0, step.max_kv_len,
                    )  # fmt: skip
                    if step.tree is not None:
                        tree = step.tree
                        return ops.decoder_layer(
                            x, *arguments, page_table=step.page_table, ancestors=tree.ancestors, depths=tree.depths
                        )
                    return ops.decoder_layer(x, *arguments, page_table=step.page_table)
            last = x
        else:
            last = x[:, x.shape[1] - keep :]
        x = own["self_attn"].forward(x, rope, cache, step, last, own["input_layernorm"], keep)
        return own["mlp"].forward(x, x, own["post_attention_layernorm"])

    def _weights(self) -> tuple[Tensor | None, ...] | None:
        """The weights in ``ops.decoder_layer``'s order; None where a part is not the plain module of this package or
        the op has no such step."""
        own: Any = self._modules
        attention, mlp = own["self_attn"], own["mlp"]
        norm1, norm2 = own["input_layernorm"], own["post_attention_layernorm"]
        if not (type(attention) is Attention and type(mlp) is MLP and type(norm1) is RMSNorm is type(norm2)):
            return None
        inner, outer = attention._modules, mlp._modules
        qkv, o, gate_up, down = inner["qkv_proj"], inner["o_proj"], outer["gate_up_proj"], outer["down_proj"]
        if not (type(qkv) is Linear is type(o) and type(gate_up) is Linear is type(down)):
            return None
        if inner["q_norm"] is not None or norm1.eps != norm2.eps:
            return None
        q, a, g, d = qkv._parameters, o._parameters, gate_up._parameters, down._parameters
        return (
            norm1._parameters["weight"], q["weight"], q["bias"], a["weight"], a["bias"],
            norm2._parameters["weight"], g["weight"], g["bias"], d["weight"], d["bias"],
        )  # fmt: skip


class LayerStack:
    """The weights of a model's layers as ``ops.decoder_layers`` takes them.

    They are looked up in the layers' dictionaries on every call, but where they are is found once, and again when a
    module, a bias that was not there, or a number in between has been replaced.
    """

    def __init__(self, layers: nn.ModuleList) -> None:
        self._layers = layers
        self._links: list[tuple[dict[str, Any], str, Any]] = []
        self._columns: list[list[tuple[dict[str, Any], str]]] | None = None
        self._linked: tuple[tuple[Any, ...], ...] = ((), (), ())  # the links, seen as columns
        self.norm_eps, self.windows = 0.0, [0]
        self._pins, self._pinned = 0, dict[int, list[list[Tensor]]]()
        self._find()

    def weights(self, count: int) -> list[list[Tensor]] | None:
        """The ten lists of the first ``count`` layers; None where a layer is not of the kind that the op knows."""
        if count in self._pinned:
            return self._pinned[count]
        where, names, found = self._linked
        same = self._columns is not None and len(self._layers) == len(self.windows)
        if not (same and all(map(is_, map(dict.get, where, names), found))):
            self._find()
        if self._columns is None:
            return None
        lists = [[where[name] for where, name in column[:count]] for column in self._columns]
        if self._pins:
            self._pinned[count] = lists
        return lists

    @contextmanager
    def pinned(self) -> Iterator[None]:
        """Within, weights are looked up once: nobody replaces one (writing into one is another matter)."""
        self._pins += 1
        try:
            yield
        finally:
            self._pins -= 1
            if not self._pins:
                self._pinned.clear()

    def _find(self) -> None:
        self._look()
        self._linked = tuple(zip(*self._links, strict=True)) or ((), (), ())

    def _look(self) -> None:
        self._links, self._columns = [], None
        columns: list[list[tuple[dict[str, Any], str]]] = [[] for _ in range(10)]
        layers: Sequence[Any] = list(self._layers)
        self.windows = [0] * len(layers)
        for i, layer in enumerate(layers):
            self._links.append((self._layers._modules, str(i), layer))
            if type(layer) is not DecoderLayer:
                return
            attention, mlp = layer.self_attn, layer.mlp
            norms = layer.input_layernorm, layer.post_attention_layernorm
            self._link(layer._modules)
            self._link(attention._modules)
            self._link(mlp._modules)
            for part, name in ((norms[0], "eps"), (norms[1], "eps"), (attention, "window")):
                if name in part.__dict__:
                    self._links.append((part.__dict__, name, part.__dict__[name]))
            if layer._weights() is None or norms[0].eps != layers[0].input_layernorm.eps:
                return
            linears = attention.qkv_proj, attention.o_proj, mlp.gate_up_proj, mlp.down_proj
            qkv, o, gate_up, down = (part._parameters for part in linears)
            places = (
                (norms[0]._parameters, "weight"), (qkv, "weight"), (qkv, "bias"), (o, "weight"), (o, "bias"),
                (norms[1]._parameters, "weight"), (gate_up, "weight"), (gate_up, "bias"), (down, "weight"),
                (down, "bias"),
            )  # fmt: skip
            for column, (where, name) in zip(columns, places, strict=True):
                if where[name] is None:
                    self._links.append((where, name, None))
                else:
                    column.append((where, name))
        if layers and all(len(column) in (0, len(layers)) for column in columns):
            self._columns = columns
        self.norm_eps = layers[0].input_layernorm.eps if layers else 0.0
        self.windows = [layer.self_attn.window or 0 for layer in layers]

    def _link(self, modules: dict[str, Any]) -> None:
        self._links += [(modules, name, module) for name, module in modules.items()]
