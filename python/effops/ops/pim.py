"""Products with matrices that lie in memory banks, as units at the banks compute them."""

from __future__ import annotations

import torch
from torch import Tensor

from effops.ops._call import BelowAutograd, dispatches

_pim_gemv = torch.ops.effops.pim_gemv.default


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
    """What units at memory banks give back for vectors times matrices, in their order and their precision.

    Row n of a matrix lies in bank ``n % units`` of tile ``n // units``, value k of it in chunk ``k // values`` (a row
    of the bank) at ``k % values``. A product command multiplies ``lanes`` neighbouring values and adds the products by
    a tree of neighbours; such sums are added one after the other, in float32 (float64 beside float64). After every
    ``sum_values`` values the result is read: rounded to x's dtype where ``narrow_results``. Adding these results is the
    caller's, as it is the processor's. Results have the same bits with every number of threads, instruction set and
    device. :class:`effops.pim.BankLayout` lays matrices out for a device.

    Args:
        x: ``[B, M, K]``, float32, bfloat16, float16 or float64 (float64 on CPUs alone), any strides.
        banks: x's dtype ``[B, tiles, chunks, units, values]``, any strides.
        out_features: N, the rows of each matrix, up to tiles * units.
        sum_values: values a result, a divisor of ``values``.
        lanes: products a command, a power of two up to 64.
        rows: int32 ``[B]`` in [0, N]: rows of each matrix that there are; others give 0 and are not read. None: all.
        columns: int32 ``[B]`` in [0, K]: values of each vector and row that there are. None: all.
        channels: tile t is in channel ``t % channels``; on CPUs a thread stands for one.
        narrow_results: whether units return results in x's dtype.

    Returns:
        float32 (float64) ``[B, M, N, ceil(K / sum_values)]``.

    Raises:
        RuntimeError: sizes, lengths or dtypes that do not fit. No gradient.

    NeuPIMs (arXiv 2403.00579, section 5), Newton (MICRO 2020).
    """
    options = {"rows": rows, "columns": columns, "channels": channels, "narrow_results": narrow_results}
    if dispatches(x, banks):
        return _pim_gemv(x, banks, out_features, sum_values, lanes, **options)
    with BelowAutograd():
        return _pim_gemv(x, banks, out_features, sum_values, lanes, **options)
