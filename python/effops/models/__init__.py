"""Assembled models that load and save Hugging Face directories."""

from __future__ import annotations

from pathlib import Path

import torch

from effops.models.config import ModelConfig
from effops.models.errors import CheckpointError
from effops.models.llama import Llama
from effops.models.mixtral import Mixtral
from effops.models.tokenizer import Tokenizer

__all__ = ["CheckpointError", "Llama", "Mixtral", "ModelConfig", "Tokenizer", "load", "load_model"]

_CLASSES: dict[str, type[Llama]] = {family: model for model in (Llama, Mixtral) for family in model.families}


def load_model(
    directory: str | Path, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> Llama:
    """The model of a directory, of the class that its configuration's ``model_type`` names; dtype None takes the
    configuration's.

    Raises:
        CheckpointError: files or fields are missing, broken or of an unknown family.
    """
    kind = ModelConfig.from_file(Path(directory)).model_type
    return _CLASSES[kind].from_pretrained(directory, dtype=dtype, device=device)


def load(
    directory: str | Path, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> tuple[Llama, Tokenizer]:
    """:func:`load_model` and the tokenizer of the directory, checked against each other."""
    model = load_model(directory, dtype=dtype, device=device)
    return model, Tokenizer.from_pretrained(directory, vocab_size=model.config.vocab_size)
