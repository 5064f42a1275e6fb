"""Whether products with weights pin one path."""

from __future__ import annotations

from types import TracebackType

_pinned = [False]


def is_batch_invariant() -> bool:
    return _pinned[0]


class batch_invariant:
    """``batch_invariant(True)``: a row's result of the products with weights, :func:`effops.ops.packed_linear`,
    :func:`effops.ops.decoder_layer`, :func:`effops.ops.decoder`, :func:`effops.ops.grouped_mm` and
    :func:`effops.ops.fused_experts`, has the same bits whatever other rows the batch holds: at some cost for few rows
    in few bits, and for many rows of plain weights, which are then not torch's to multiply.

    Holds for the process, from the call on, or as a context manager for its block. The default, ``False``, lets the
    number of rows choose the loop. All other ops are independent of the batch anyway, but for drafts
    (:func:`effops.ops.medusa_draft`), which change no result.
    """

    def __init__(self, enabled: bool = True) -> None:
        self._before = _pinned[0]
        _pinned[0] = enabled

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _pinned[0] = self._before
