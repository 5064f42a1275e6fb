"""Text of both drafters, and what the shipped code model makes of it: its final hidden states.

The split is the code model's own (../train_code_model/data.py), checked file by file against its record.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parents[1] / "train_code_model"))

from data import encode_documents, read_source, stdlib_dir, training_files
from tokenizers import Tokenizer
from transformers import LlamaForCausalLM

SHIPPED = Path(__file__).resolve().parents[2] / "python/effops/models/shipped"
BASE = SHIPPED / "code-7m"
WINDOW, OVERLAP = 1024, 128  # tokens; a window's first OVERLAP are context alone, but for a document's beginning

# Held-out files that the acceptance tables are counted on and trials are judged by; the others measure the result.
CALIBRATION = ("bisect", "calendar", "csv", "fractions", "getpass", "gzip", "queue", "shlex")


def base_record() -> dict[str, Any]:
    """The code model's training record."""
    return json.loads((BASE / "training.json").read_text())


def base_tokenizer() -> Tokenizer:
    """The code model's tokenizer, which the drafters share."""
    return Tokenizer.from_file(str(BASE / "tokenizer.json"))


def base_model(dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """The frozen code model."""
    model = LlamaForCausalLM.from_pretrained(BASE, dtype=dtype, attn_implementation="sdpa").eval()
    return model.requires_grad_(False)


def training_documents() -> list[Tensor]:
    """Token ids, int64 [n] a file, of the code model's training split; another interpreter's library is an error."""
    root, expected = stdlib_dir(), base_record()["split"]
    files = training_files()
    found = {path.as_posix(): hashlib.sha256((root / path).read_bytes()).hexdigest() for path in files}
    if found != expected["training_files"]:
        wrong = {item[0] for item in found.items() ^ expected["training_files"].items()}
        raise SystemExit(
            f"{root}: {len(wrong)} files are not those of Python {expected['python_version']}, "
            f"which the code model was trained on ({', '.join(sorted(wrong)[:3])} ...)"
        )
    documents = encode_documents(base_tokenizer(), [read_source(root / path) for path in files])
    return [torch.from_numpy(ids) for ids in documents]


def held_out_documents(calibration: bool) -> dict[str, Tensor]:
    """Token ids by module of the shipped held-out files: those of CALIBRATION, or the others."""
    texts = {
        path.name.removesuffix(".py.txt"): read_source(path) for path in sorted((SHIPPED / "heldout").glob("*.py.txt"))
    }
    chosen = {name: text for name, text in texts.items() if (name in CALIBRATION) == calibration}
    documents = encode_documents(base_tokenizer(), list(chosen.values()))
    return {name: torch.from_numpy(ids) for name, ids in zip(chosen, documents, strict=True)}


@torch.inference_mode()
def document_hidden(model: LlamaForCausalLM, ids: Tensor, window: int = WINDOW, overlap: int = OVERLAP) -> Tensor:
    """The model's states behind its last norm, [n, d] for ids [n]: past the beginning each sees `overlap` tokens or
    more."""
    rows: list[Tensor] = []
    done = 0
    while done < len(ids):
        begin = max(0, done - overlap)
        part = model.model(input_ids=ids[None, begin : begin + window]).last_hidden_state[0]
        rows.append(part[done - begin :])
        done = begin + len(part)
    return torch.cat(rows)


class Corpus:
    """Training tokens and the code model's hidden states at them, computed once and then mapped from a file."""

    def __init__(self, out: Path) -> None:
        documents = training_documents()
        self.tokens = torch.cat(documents)
        # Tokens that follow a position in its own document; a target further on does not exist.
        self.left = torch.cat([torch.arange(len(ids) - 1, -1, -1) for ids in documents])
        out.mkdir(parents=True, exist_ok=True)
        path = out / "hidden.bf16"
        width = base_model().config.hidden_size
        if not path.exists():
            self._compute(path, documents)
        size = len(self.tokens) * width
        self.hidden = torch.from_file(str(path), shared=True, size=size, dtype=torch.bfloat16).view(-1, width)

    def _compute(self, path: Path, documents: list[Tensor]) -> None:
        model = base_model(torch.bfloat16)
        started, done, total = time.monotonic(), 0, sum(map(len, documents))
        temporary = path.with_suffix(".tmp")
        with temporary.open("wb") as file:
            for i, ids in enumerate(documents):
                hidden = document_hidden(model, ids)
                file.write(hidden.contiguous().view(torch.int16).numpy().tobytes())
                done += len(ids)
                if i % 20 == 19 or done == total:
                    speed = done / (time.monotonic() - started)
                    print(f"hidden states {done:,}/{total:,}  {speed:.0f} tokens/s", flush=True)
        os.replace(temporary, path)


def copy_licence(out: Path) -> None:
    """The licence of the code model and its text, which covers what derives from them."""
    shutil.copyfile(BASE / "LICENSE", out / "LICENSE")
