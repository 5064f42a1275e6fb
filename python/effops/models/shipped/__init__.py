"""The code model, its two drafters, a mixture of experts, and held-out source files, as package data."""

from __future__ import annotations

from pathlib import Path

_HERE = Path(__file__).resolve().parent


def model_dir() -> Path:
    """Hugging Face directory of the shipped code model (config.json, model.safetensors, tokenizer.json)."""
    return _HERE / "code-7m"


def medusa_dir() -> Path:
    """Directory of Medusa heads for the code model: ``decoding.MedusaHeads.from_pretrained`` reads it."""
    return _HERE / "code-7m-medusa"


def draft_dir() -> Path:
    """Directory of a draft model of less than 1M parameters with the code model's tokenizer, which is not repeated:
    ``Llama.from_pretrained`` reads it."""
    return _HERE / "code-1m"


def moe_dir() -> Path:
    """Directory of a mixture-of-experts code model (Mixtral's configuration) with the code model's tokenizer, which is
    not repeated: ``models.load_model`` reads it."""
    return _HERE / "code-moe-8m"


def heldout_files() -> list[Path]:
    """Python sources the shipped model was not trained on, sorted by name; UTF-8, each ends in `.py.txt`."""
    return sorted((_HERE / "heldout").glob("*.py.txt"))
