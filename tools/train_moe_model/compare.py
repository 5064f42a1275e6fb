"""Does the loss follow the reference's? `python tools/train_moe_model/compare.py --run DIR` trains the model from the
same seed on the same text, in float32: with Transformers' own expert loop and with effops' ops. Writes compare.json
into the run's directory, which `export_moe.py` puts into training.json. Muon's iterations are float32, too: in bfloat16
they turn differences of the last bit into ones of 2^-9, and any two ways of computing a layer part after 50 steps.

In float32 they part as well, once a token lies so close to the border of two experts that rounding decides. A third
run, the reference with its first weights changed in the last bit, shows when the reference parts from itself.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

sys.path.append(str(Path(__file__).resolve().parents[1] / "train_code_model"))

from data import encode_documents, read_source, stdlib_dir, training_files
from model import lr_factor, update
from moe_model import build_model, build_optimizers, objective
from sampling import Sampler
from tokenizers import Tokenizer
from torch import Tensor
from train import SEED
from train_moe import code_tokenizer

REFERENCE, OURS, NUDGED = "eager", "effops", "eager, last bits changed"
SAME = 2**-19  # relative difference of two losses up to which the runs have not parted: 32 roundings
ROWS, LENGTH = 4, 256  # tokens of a step; few, for the reference is slow


def loss_curve(
    experts: str, tokenizer: Tokenizer, batches: Iterable[tuple[Tensor, Tensor]], **sizes: int
) -> list[float]:
    """Nats per token at each step of a fresh float32 model of this seed, with the training's own optimizers, Muon in
    float32."""
    torch.manual_seed(SEED)
    model = build_model(tokenizer, REFERENCE if experts == NUDGED else experts, **sizes)
    if experts == NUDGED:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter *= 1 + 2**-23
    optimizers, losses = build_optimizers(model, torch.float32), []
    for step, (inputs, targets) in enumerate(batches):
        loss, nats = objective(model, inputs, targets, precise=True)
        loss.backward()
        update(model, optimizers, lr_factor(step, 0))
        losses.append(nats.item())
    return losses


def largest_difference(reference: list[float], other: list[float]) -> float:
    """Largest relative difference of two curves."""
    return max((abs(a - b) / a for a, b in zip(reference, other, strict=True)), default=0.0)


def difference_record(reference: list[float], other: list[float]) -> dict[str, Any]:
    """How far a curve is from the reference: until they part, and in all."""
    pairs = zip(reference, other, strict=True)
    parted = next((i for i, (a, b) in enumerate(pairs) if abs(a - b) / a > SAME), len(reference))
    before = largest_difference(reference[:parted], other[:parted])
    return {
        "steps_together": parted,
        "largest_until_then": float(f"{before:.3g}"),
        "largest": float(f"{largest_difference(reference, other):.3g}"),
    }


def compare(steps: int) -> dict[str, Any]:
    """The curves over the training text."""
    tokenizer = code_tokenizer()
    root = stdlib_dir()
    sampler = Sampler(encode_documents(tokenizer, [read_source(root / path) for path in training_files()]), SEED)
    curves: dict[str, list[float]] = {}
    for experts in (REFERENCE, OURS, NUDGED):
        begin = time.monotonic()
        batches = (sampler.batch(0, step * ROWS, ROWS, LENGTH) for step in range(steps))
        curves[experts] = [round(nats, 6) for nats in loss_curve(experts, tokenizer, batches)]
        print(
            f"{experts}: {steps} steps in {time.monotonic() - begin:.0f} s, loss {curves[experts][-1]:.4f}", flush=True
        )
    return {
        "steps": steps,
        "tokens_a_step": ROWS * LENGTH,
        "dtype": "float32",
        "relative_difference": {name: difference_record(curves[REFERENCE], curves[name]) for name in (OURS, NUDGED)},
        "losses": curves,
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="gets compare.json")
    parser.add_argument("--steps", type=int, default=100)
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.run.mkdir(parents=True, exist_ok=True)
    record = compare(args.steps)
    (args.run / "compare.json").write_text(json.dumps(record, indent=1) + "\n")
    print(record["relative_difference"])


if __name__ == "__main__":
    main()
