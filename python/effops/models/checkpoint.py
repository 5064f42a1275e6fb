"""Reading and writing model directories: safetensors files, one or several, with an index.

Every fault of the files is a ``CheckpointError`` that names the file and the tensor or field.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from effops.models.config import read_json
from effops.models.errors import CheckpointError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError:
        raise ImportError("effops[models] is needed: pip install 'effops[models]'") from None
    return safetensors


class TensorFiles:
    """The tensors of a checkpoint directory by name, opened lazily and mapped rather than read."""

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        if not self.directory.is_dir():
            raise CheckpointError(str(directory), "directory", "expected to exist, got nothing")
        index, single = self.directory / INDEX, self.directory / SINGLE
        self._files: dict[str, Any] = {}
        self._place: dict[str, str]
        if single.exists():
            self.source = single
            self._place = dict.fromkeys(self._open(SINGLE).keys(), SINGLE)
        elif index.exists():
            self.source = index
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict):
                raise CheckpointError(str(index), "weight_map", f"expected an object, got {weight_map!r}")
            self._place = weight_map
        else:
            raise CheckpointError(str(self.directory), "weights", f"expected {SINGLE} or {INDEX}, got neither")

    def names(self) -> set[str]:
        return set(self._place)

    def copy_into(self, name: str, target: Tensor, order: Tensor | None = None) -> None:
        """Copies a tensor into ``target``, converting its dtype; the shape must agree. With ``order`` int64, row i
        goes to row ``order[i]``."""
        found = self.read(name)
        if found.shape != target.shape:
            path = str(self.directory / self._place[name])
            raise CheckpointError(path, name, f"expected shape {list(target.shape)}, got {list(found.shape)}")
        if order is None:
            target.copy_(found)
        else:
            target[order.to(target.device)] = found.to(target)

    def read(self, name: str) -> Tensor:
        if name not in self._place:
            raise CheckpointError(str(self.source), name, "expected a tensor, got nothing")
        file = self._place[name]
        try:
            found: Tensor = self._open(file).get_tensor(name)
        except _safetensors().SafetensorError as error:
            path = str(self.directory / file)
            raise CheckpointError(path, name, f"expected a readable tensor, got {error}") from None
        return found

    def _open(self, file: str) -> Any:
        if file not in self._files:
            path = self.directory / file
            if not path.exists():
                raise CheckpointError(str(path), "file", f"expected to exist ({INDEX} names it), got nothing")
            try:
                self._files[file] = _safetensors().safe_open(str(path), framework="pt")
            except (_safetensors().SafetensorError, OSError) as error:
                raise CheckpointError(str(path), "file", f"expected a whole safetensors file, got {error}") from None
        return self._files[file]


@contextmanager
def written_atomically(path: Path) -> Iterator[Path]:
    """A temporary name in the same directory, moved to ``path`` on success and removed on failure."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    with written_atomically(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def save_tensors(directory: Path, tensors: Mapping[str, Tensor], max_shard_bytes: int) -> None:
    """Writes ``model.safetensors``, or shards of about ``max_shard_bytes`` at most and an index."""
    shards: list[list[str]] = [[]]
    used = 0
    for name, tensor in tensors.items():
        if shards[-1] and used + tensor.nbytes > max_shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += tensor.nbytes

    save_file = _safetensors().torch.save_file
    files = [SINGLE]
    if len(shards) > 1:
        files = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for file, names in zip(files, shards, strict=True):
        with written_atomically(directory / file) as temporary:
            part = {name: tensors[name].detach().to("cpu", copy=True).contiguous() for name in names}
            save_file(part, str(temporary), metadata={"format": "pt"})
    if len(shards) > 1:
        weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        total = sum(tensor.nbytes for tensor in tensors.values())
        write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
        files.append(INDEX)
    for stale in [*directory.glob("model*.safetensors"), directory / INDEX]:  # of an earlier save
        if stale.name not in files:
            stale.unlink(missing_ok=True)


def parse_dtype(name: str, source: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise CheckpointError(source, "dtype", f"expected a floating dtype, got {name!r}")
    return dtype
