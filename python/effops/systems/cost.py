"""Bytes of keys, values and labels that a decode step of one sequence reads."""

from __future__ import annotations

from effops.models import Llama


def bytes_read(
    model: Llama, length: int, *, budget: int | None = None, label_bits: int = 0, dense_layers: int = 2
) -> int:
    """Of a step whose query sees ``length`` tokens, or ``budget`` of them in every layer but the first
    ``dense_layers``, found by labels of ``label_bits`` a token and KV head (0: without labels).

    A layer with a window of its own reads that window.
    """
    c = model.config
    row = (c.head_dim + (c.v_head_dim or c.head_dim)) * model.dtype.itemsize
    total = 0
    for i, window in enumerate(c.windows):
        tokens = min(length, window or length)
        if budget is not None and i >= dense_layers and not window and budget < length:
            tokens = budget
            total += c.num_key_value_heads * length * label_bits // 8
        total += c.num_key_value_heads * tokens * row
    return total
