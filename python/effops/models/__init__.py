"""Assembled models that load and save Hugging Face directories."""

from __future__ import annotations

from pathlib import Path

import torch

from effops.models.config import ModelConfig
from effops.models.errors import CheckpointError
from effops.models.llama import Llama
from effops.models.tokenizer import Tokenizer

__all__ = ["CheckpointError", "Llama", "ModelConfig", "Tokenizer", "load"]


def load(
    directory: str | Path, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> tuple[Llama, Tokenizer]:
    """The model and the tokenizer of a directory, checked against each other."""
    model = Llama.from_pretrained(directory, dtype=dtype, device=device)
    return model, Tokenizer.from_pretrained(directory, vocab_size=model.config.vocab_size)
