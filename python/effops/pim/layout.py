"""Where a matrix lies in a device's banks, and products with it in the banks' order."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from effops import ops
from effops.pim.device import Device


class Address(NamedTuple):
    """A value's place in a device."""

    channel: int
    rank: int
    bank_group: int
    bank: int
    row: int
    column: int  # in values


@dataclass(frozen=True)
class BankLayout:
    """How a device's banks hold matrices of 16-bit values.

    Row n of a matrix lies in bank ``n % units`` of tile ``n // units``, tile t in channel ``t % channels``; its values
    go along rows of the bank, ``values`` in each. ``units`` are the banks that work together: all of a channel where
    they have units of their own, those of one access where a near processor reads them.

    Units at banks return their sums in 16 bits after every row (``narrow``); a near processor keeps them in float32.
    """

    channels: int
    ranks: int
    bank_groups: int
    banks_per_group: int
    units: int
    values: int
    lanes: int
    narrow: bool

    @classmethod
    def of(cls, device: Device | str) -> BankLayout:
        """The layout of a device with processing in memory.

        Raises:
            ValueError: the device has none.
        """
        device = device if isinstance(device, Device) else Device.load(device)
        kind = device.get("pim.kind")
        if kind is None:
            raise ValueError(f"BankLayout: device: expected one with processing in memory, got {device.name}")
        ranks, groups, banks = (device[f"memory.{n}"] for n in ("ranks", "bank_groups", "banks_per_group"))
        near = kind == "near"
        return cls(
            channels=device["memory.channels"],
            ranks=ranks,
            bank_groups=groups,
            banks_per_group=banks,
            units=device["pim.banks_per_access"] if near else ranks * groups * banks,
            values=device["memory.row_bytes"] // 2,
            lanes=(device["memory.access_bytes"] if near else device["pim.comp_bytes"]) // 2,
            narrow=not near and device["pim.result_bytes"] == 2,
        )

    def tiles(self, out_features: int) -> int:
        return -(-out_features // self.units)

    def chunks(self, in_features: int) -> int:
        return -(-in_features // self.values)

    def address(self, n: int, k: int, in_features: int, first_row: int = 0) -> Address:
        """Where value k of row n of a matrix lies; no two values share a place."""
        tile, unit = divmod(n, self.units)
        bundles = self.ranks * self.bank_groups * self.banks_per_group // self.units
        turn, channel = divmod(tile, self.channels)
        row, bundle = divmod(turn, bundles)
        bank = bundle * self.units + unit
        rank, in_rank = divmod(bank, self.bank_groups * self.banks_per_group)
        group, in_group = divmod(in_rank, self.banks_per_group)
        chunk, column = divmod(k, self.values)
        return Address(channel, rank, group, in_group, first_row + row * self.chunks(in_features) + chunk, column)

    def pack(self, matrix: Tensor) -> Tensor:
        """``[..., N, K]`` to rows of banks ``[..., tiles, chunks, units, values]``, zeros where nothing lies."""
        *batch, n, k = matrix.shape
        tiles, chunks = self.tiles(n), self.chunks(k)
        padded = torch.nn.functional.pad(matrix, (0, chunks * self.values - k, 0, tiles * self.units - n))
        split = padded.reshape(*batch, tiles, self.units, chunks, self.values)
        return split.transpose(-3, -2).contiguous()

    def unpack(self, banks: Tensor, n: int, k: int) -> Tensor:
        """The matrix ``[..., N, K]`` of ``pack``."""
        return banks.transpose(-3, -2).flatten(-2, -1).flatten(-3, -2)[..., :n, :k]

    def gemv(
        self,
        x: Tensor,
        banks: Tensor,
        out_features: int,
        *,
        sum_values: int | None = None,
        rows: Tensor | None = None,
        columns: Tensor | None = None,
    ) -> Tensor:
        """Results ``[B, M, N, sums]`` of :func:`effops.ops.pim_gemv` as this device gives them. On a GPU a stream of
        their own stands for the units."""
        with beside(x):
            return ops.pim_gemv(
                x, banks, out_features, sum_values or self.values, self.lanes, rows=rows, columns=columns,
                channels=self.channels, narrow_results=self.narrow,
            )  # fmt: skip

    def matvec(self, x: Tensor, banks: Tensor, out_features: int, *, columns: Tensor | None = None) -> Tensor:
        """x ``[B, M, K]`` times the matrices, the rows' results added one after the other in float32 ``[B, M, N]``."""
        results = self.gemv(x, banks, out_features, columns=columns)
        if results.shape[-1] == 0:
            return results.new_zeros(results.shape[:-1])
        total = results[..., 0]
        for i in range(1, results.shape[-1]):
            total = total + results[..., i]
        return total


_streams: dict[torch.device, torch.cuda.Stream] = {}


@contextmanager
def beside(x: Tensor) -> Iterator[None]:
    """Work on x goes to the units' side: on a GPU a stream that waits for the caller's, and is waited for."""
    if not x.is_cuda:
        yield
        return
    here = torch.cuda.current_stream(x.device)
    if x.device not in _streams:
        _streams[x.device] = torch.cuda.Stream(x.device)
    side = _streams[x.device]
    side.wait_stream(here)
    with torch.cuda.stream(side):
        yield
    here.wait_stream(side)
