"""Text to tokens and back: a thin layer over the ``tokenizers`` library."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from effops.models.checkpoint import written_atomically
from effops.models.errors import CheckpointError


class Tokenizer:
    """The ``tokenizer.json`` of a model directory."""

    def __init__(self, backend: Any) -> None:
        self.backend = backend

    @classmethod
    def from_pretrained(cls, directory: str | Path, *, vocab_size: int | None = None) -> Tokenizer:
        """Reads ``tokenizer.json``; with ``vocab_size`` every id must fit into the model's vocabulary."""
        try:
            import tokenizers
        except ImportError:
            raise ImportError("effops[models] is needed: pip install 'effops[models]'") from None
        path = Path(directory)
        path = path / "tokenizer.json" if path.is_dir() else path
        if not path.exists():
            raise CheckpointError(str(path), "file", "expected to exist, got nothing")
        try:
            tokenizer = cls(tokenizers.Tokenizer.from_file(str(path)))
        except Exception as error:  # the library raises plain Exception on a broken file
            raise CheckpointError(str(path), "file", f"expected a tokenizer, got {error}") from None
        largest = max(tokenizer.backend.get_vocab(with_added_tokens=True).values(), default=-1)
        if vocab_size is not None and largest >= vocab_size:
            raise CheckpointError(
                str(path), "vocab", f"expected ids below the model's vocab_size {vocab_size}, got {largest}"
            )
        return tokenizer

    def save(self, directory: str | Path) -> None:
        """Writes ``tokenizer.json`` under a temporary name and moves it."""
        with written_atomically(Path(directory) / "tokenizer.json") as temporary:
            self.backend.save(str(temporary))

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self.backend.encode(text).ids
        return ids

    def decode(self, tokens: Sequence[int]) -> str:
        text: str = self.backend.decode(list(tokens), skip_special_tokens=True)
        return text

    def stream(self) -> Callable[[int], str]:
        """A function from each next token to the text it completes, '' inside a multi-token character."""
        from tokenizers.decoders import DecodeStream

        decoder = DecodeStream(skip_special_tokens=True)
        return lambda token: decoder.step(self.backend, token) or ""
