"""Held-out bits per byte of a causal language model, and what `xz -9` needs for the same files."""

from __future__ import annotations

import argparse
import lzma
import math
from pathlib import Path

import numpy as np
import torch


def score_document(model: torch.nn.Module, ids: np.ndarray, context: int, stride: int) -> float:
    """Nats that `model` needs for ids[1:] of one document, ids int64 [n] beginning with BOS.

    Windows of `context` inputs advance by `stride` <= context; each scores only the tokens that no earlier
    window scored, so past the first window every token has more than context - stride tokens before it.
    """
    tokens = torch.from_numpy(ids)
    nats, scored = 0.0, 1
    for begin in range(0, len(ids), stride):
        window = tokens[begin : begin + context + 1]
        end = begin + len(window)
        if end <= scored:
            break
        with torch.inference_mode():
            hidden = model.model(input_ids=window[None, :-1]).last_hidden_state[0, scored - begin - 1 :]
            logits = model.lm_head(hidden)
        targets = tokens[scored:end]
        nats += torch.nn.functional.cross_entropy(logits.float(), targets, reduction="sum").item()
        scored = end
    return nats


def bits_per_byte(
    model: torch.nn.Module, documents: list[np.ndarray], total_bytes: int, context: int, stride: int
) -> float:
    """Bits per byte over all `documents` (BOS, text, EOS; the end token is paid for, too)."""
    was_training = model.training
    model.eval()
    nats = sum(score_document(model, ids, context, stride) for ids in documents)
    model.train(was_training)
    return nats / math.log(2) / total_bytes


def xz_bits_per_byte(files: list[bytes]) -> tuple[float, float]:
    """Bits per byte of `xz -9`: (sum of the files compressed one by one, all files as one stream)."""
    total = sum(map(len, files))
    one_by_one = sum(len(lzma.compress(data, preset=9)) for data in files)
    together = len(lzma.compress(b"".join(files), preset=9))
    return 8 * one_by_one / total, 8 * together / total


def main() -> None:
    """Print held-out bits per byte of a model directory over a directory of held-out files."""
    from data import encode_documents
    from tokenizers import Tokenizer
    from transformers import LlamaForCausalLM

    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--model", type=Path, required=True, help="directory with config.json and weights")
    parser.add_argument("--held-out", type=Path, required=True, help="directory with *.py.txt files")
    parser.add_argument("--stride", type=int, default=1024)
    args = parser.parse_args()

    model = LlamaForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    tokenizer = Tokenizer.from_file(str(args.model / "tokenizer.json"))
    files = [path.read_bytes() for path in sorted(args.held_out.glob("*.py.txt"))]
    documents = encode_documents(tokenizer, [data.decode("utf-8") for data in files])
    context = model.config.max_position_embeddings
    bpb = bits_per_byte(model, documents, sum(map(len, files)), context, args.stride)
    one_by_one, together = xz_bits_per_byte(files)
    print(f"model {bpb:.4f} bits per byte; xz -9: {one_by_one:.4f} file by file, {together:.4f} together")
    print(f"ratio {bpb / one_by_one:.3f} and {bpb / together:.3f}")


if __name__ == "__main__":
    main()
