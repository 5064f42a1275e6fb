"""The error of everything that is wrong with a model directory."""

from __future__ import annotations


class CheckpointError(ValueError):
    """One line that names the file, the field or tensor in it, what was expected and what was found."""

    def __init__(self, source: str, field: str, detail: str) -> None:
        super().__init__(f"{source}: {field}: {detail}")
        self.source, self.field, self.detail = source, field, detail
