"""Units at memory banks, one product command after the other."""

from __future__ import annotations

import torch
from torch import Tensor


def pim_gemv(
    x: Tensor,
    banks: Tensor,
    out_features: int,
    sum_values: int,
    lanes: int,
    *,
    rows: Tensor | None = None,
    columns: Tensor | None = None,
    channels: int = 1,
    narrow_results: bool = True,
) -> Tensor:
    """``ops.pim_gemv``, bit for bit: walks over the rows that every bank opens, all banks at once."""
    batch, count, width = x.shape
    _, tiles, chunks, units, values = banks.shape
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    sums = -(-width // sum_values)
    results = torch.zeros(batch, count, tiles, units, sums, dtype=wide)
    for b in range(batch):
        there = width if columns is None else int(columns[b])
        for m in range(count):
            vector = torch.zeros(chunks * values, dtype=wide)
            vector[:there] = x[b, m, :there].to(wide)
            for s in range(sums):
                acc = torch.zeros(tiles, units, dtype=wide)
                chunk, first = divmod(s * sum_values, values)
                for at in range(first, first + min(sum_values, max(there - s * sum_values, 0)), lanes):
                    end = min(at + lanes, first + sum_values, there - chunk * values)
                    opened = banks[b, :, chunk, :, at:end].to(wide)
                    products = torch.zeros(tiles, units, lanes, dtype=wide)
                    products[..., : end - at] = opened * vector[chunk * values + at : chunk * values + end]
                    while products.shape[-1] > 1:
                        products = products[..., 0::2] + products[..., 1::2]
                    acc = acc + products[..., 0]
                results[b, m, :, :, s] = acc.to(x.dtype).to(wide) if narrow_results else acc
    results = results.flatten(2, 3)[:, :, :out_features]
    if rows is not None:
        absent = torch.arange(out_features) >= rows[:, None]
        results = results.masked_fill(absent[:, None, :, None], 0)
    return results
