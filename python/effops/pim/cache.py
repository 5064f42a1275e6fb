"""A KV cache in banks, whose decode steps attend as units at the banks do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from effops.cache.base import Step
from effops.cache.dense import DenseKVCache, RotatingLayer
from effops.pim.device import Device
from effops.pim.layout import BankLayout


class BankedLayer(RotatingLayer):
    """Keys and values of one layer, once as they are and once in banks (NeuPIMs, section 6.3).

    ``keys`` ``[B, tiles, chunks, units, values]``: token t in bank ``t % units``, its heads along rows. ``values``
    ``[B, G, tiles, chunks, units, values]``: element j of a head in bank ``j % units``, positions along rows.
    """

    __slots__ = ("keys", "layout", "values")

    def __init__(self, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, layout: BankLayout) -> None:
        super().__init__(k, v)
        self.keys, self.values, self.layout = keys, values, layout

    def append(self, k: Tensor, v: Tensor, step: Step) -> None:
        super().append(k, v, step)
        self.write(k, v, step.slots)

    def write(self, k: Tensor, v: Tensor, slots: Tensor) -> None:
        """k ``[B, T, G, D]`` and v to the banks at slots int32 ``[B, T]``, -1: not."""
        units, values = self.layout.units, self.layout.values
        b, t = (slots >= 0).nonzero(as_tuple=True)
        at = slots[b, t].long()
        rows = k[b, t].flatten(1).to(self.keys.dtype)
        rows = torch.nn.functional.pad(rows, (0, self.keys.shape[2] * values - rows.shape[1]))
        self.keys[b, at // units, :, at % units] = rows.view(len(b), -1, values)
        elements = v[b, t].to(self.values.dtype)  # [n, G, Dv]
        tiles = self.values.shape[2]
        elements = torch.nn.functional.pad(elements, (0, tiles * units - elements.shape[2]))
        lying = self.values.permute(0, 3, 5, 1, 2, 4)  # [B, chunks, values, G, tiles, units]
        lying[b, at // values, at % values] = elements.view(len(b), -1, tiles, units)

    def attend(self, q: Tensor, step: Step, *, causal: bool = True, **options: Any) -> Tensor:
        """A decode step's at the banks; prompts, trees and layers with a window are the processor's."""
        decodes = step.slots.shape[1] == 1 and q.shape[1] == 1 and step.tree is None
        if not decodes or any(value for name, value in options.items() if name != "scale"):
            return super().attend(q, step, causal=causal, **options)
        scale = options.get("scale")
        return self._attend_banked(q, step, q.shape[-1] ** -0.5 if scale is None else scale)

    def _attend_banked(self, q: Tensor, step: Step, scale: float) -> Tensor:
        batch, _, heads, dim = q.shape
        kv_heads, length, lens = self.k.shape[2], step.max_kv_len, step.kv_lens
        group = heads // kv_heads
        # A vector in the buffer has one query of every KV head; the units return a sum a head and token.
        vectors = q[:, 0].view(batch, kv_heads, group, dim).transpose(1, 2).reshape(batch, group, kv_heads * dim)
        logits = self.layout.gemv(vectors.to(self.keys.dtype), self.keys, length, sum_values=dim, rows=lens)
        logits = logits[..., :kv_heads].permute(0, 3, 1, 2) * scale  # [B, G, group, L]
        absent = torch.arange(length, device=q.device) >= lens[:, None]
        # Softmax is the processor's.
        weights = logits.masked_fill(absent[:, None, None], -torch.inf).softmax(-1).nan_to_num(0.0)
        weights = weights.to(self.values.dtype).flatten(0, 1)  # [B * G, group, L]
        out = self.layout.matvec(
            weights, self.values.flatten(0, 1), self.v.shape[3], columns=lens.repeat_interleave(kv_heads)
        )
        return out.view(batch, 1, heads, -1).to(q.dtype)


class BankedKVCache(DenseKVCache):
    """A dense cache that also lies in the banks of a device, in ``bank_dtype``; decode steps compute scores and their
    products with the values there, softmax on the processor. A row of a bank must hold whole heads.

    Raises:
        ValueError: a device without processing in memory, or heads that no row of a bank holds.
    """

    def __init__(
        self,
        device_model: Device | str,
        num_layers: int,
        batch_size: int,
        capacity: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        v_head_dim: int | None = None,
        dtype: torch.dtype = torch.float32,
        bank_dtype: torch.dtype = torch.float16,
        device: torch.device | str = "cpu",
    ) -> None:
        layout = BankLayout.of(device_model)
        if layout.values % head_dim:
            expected = f"a divisor of the {layout.values} values of a bank's row"
            raise ValueError(f"BankedKVCache: head_dim: expected {expected}, got {head_dim}")
        super().__init__(
            num_layers, batch_size, capacity, num_kv_heads, head_dim, v_head_dim=v_head_dim, dtype=dtype, device=device
        )
        self.layout = layout
        key_rows = (layout.tiles(capacity), layout.chunks(num_kv_heads * head_dim))
        value_rows = (layout.tiles(v_head_dim or head_dim), layout.chunks(capacity))
        row = (layout.units, layout.values)
        with torch.inference_mode(False):
            place: Any = {"dtype": bank_dtype, "device": device}
            self._keys = torch.zeros(num_layers, batch_size, *key_rows, *row, **place)
            self._values = torch.zeros(num_layers, batch_size, num_kv_heads, *value_rows, *row, **place)
        self.layers = [
            BankedLayer(layer.k, layer.v, keys, values, layout)
            for layer, keys, values in zip(self.layers, self._keys, self._values, strict=True)
        ]

    @property
    def nbytes(self) -> int:
        """Bytes of key and value memory, banks included."""
        return super().nbytes + self._keys.nbytes + self._values.nbytes

    def _move(self, nodes: Tensor, starts: Tensor) -> None:
        """Accepted rows also move in the banks."""
        super()._move(nodes, starts)
        k, v = self._as_one_batch
        slots = starts[:, None] + torch.arange(nodes.shape[1], dtype=torch.int32, device=nodes.device)
        slots = torch.where(nodes < 0, -1, slots)
        rows = torch.arange(k.shape[0], device=k.device)[:, None]
        at = slots.long().clamp(min=0)
        layers = len(self.layers)
        new_k, new_v = (x[rows, at].unflatten(0, (layers, -1)) for x in (k, v))
        every = slots.unflatten(0, (layers, -1))
        for layer, layer_k, layer_v, layer_slots in zip(self.layers, new_k, new_v, every, strict=True):
            assert isinstance(layer, BankedLayer)
            layer.write(layer_k, layer_v, layer_slots)

    def reorder(self, rows: Sequence[int]) -> None:
        super().reorder(rows)
        with torch.inference_mode(self._keys.is_inference()), torch.no_grad():
            for memory in (self._keys, self._values):
                memory[:] = memory[:, list(rows)]
