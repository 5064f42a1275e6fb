"""What was trained or calibrated, kept from one run to the next under a name that says of what."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from effops.models import Llama
from effops.models.checkpoint import written_atomically


def cache_dir() -> Path:
    """``EFFOPS_CACHE``, else ``$XDG_CACHE_HOME/effops``, else ``~/.cache/effops``."""
    if own := os.environ.get("EFFOPS_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "effops"


def fingerprint(model: Llama) -> str:
    """SHA-256 of the configuration and of every weight's bytes, wherever the model was loaded from."""
    digest = hashlib.sha256(json.dumps(model.config.to_dict(), sort_keys=True).encode())
    for name, x in sorted(model.state_dict().items()):
        digest.update(f"{name}{tuple(x.shape)}{x.dtype}".encode())
        digest.update(x.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def kept(
    system: str, settings: Mapping[str, Any], make: Callable[[], dict[str, Tensor]], *, again: bool = False
) -> dict[str, Tensor]:
    """The tensors that ``make`` gives under these settings: made once, then read from
    ``cache_dir()/system-<hash of the settings>.safetensors``; with ``again`` made and written anew.

    ``settings`` are everything that the tensors depend on, as JSON can write it.
    """
    from safetensors.torch import load_file, save_file

    name = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
    path = cache_dir() / f"{system}-{name}.safetensors"
    if path.exists() and not again:
        return load_file(str(path))
    tensors = {name: x.detach().cpu().contiguous() for name, x in make().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_atomically(path) as temporary:
        save_file(tensors, str(temporary), {"settings": json.dumps(settings, sort_keys=True)})
    return tensors
