"""Train the small mixture-of-experts code model: `python tools/train_moe_model/train_moe.py --out DIR --hours H`.

Text, tokenizer, sampling and schedule are those of ../train_code_model, whose loop this runs; the model is
Mixtral's. `--experts` picks what computes the expert layers.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).resolve().parents[1] / "train_code_model"))

from moe_model import EXPERTS, build_model, build_optimizers, objective
from tokenizers import Tokenizer
from train import Run, train

SHIPPED = Path(__file__).resolve().parents[2] / "python/effops/models/shipped"


def code_tokenizer() -> Tokenizer:
    """code-7m's tokenizer, which this model shares."""
    return Tokenizer.from_file(str(SHIPPED / "code-7m/tokenizer.json"))


class MoeRun(Run):
    """A training run of the mixture-of-experts model."""

    def __init__(self, out: Path, experts: str = "sorted", dtype: str = "bf16") -> None:
        self.experts = experts
        super().__init__(out, dtype)

    def tokenizer(self, out: Path, texts: list[str]) -> Tokenizer:
        """The shared one."""
        return code_tokenizer()

    def build(self, tokenizer: Tokenizer) -> tuple[torch.nn.Module, list[torch.optim.Optimizer]]:
        """The model and its optimizers."""
        model = build_model(tokenizer, self.experts)
        return model, build_optimizers(model, torch.float32 if self.dtype == "f32" else torch.bfloat16)

    def compiled(self) -> bool:
        """Whether the loss is compiled: the layer made for training alone is."""
        return self.experts == "sorted"

    def objective(self, inputs: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cross entropy with the router's losses, and cross entropy alone."""
        return objective(self.model, inputs, targets, precise=self.dtype == "f32")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory of the checkpoint; goes on if one is there")
    parser.add_argument("--hours", type=float, default=1.0, help="wall time that fixes the number of tokens")
    parser.add_argument("--steps", type=int, default=0, help="of 8192 tokens; otherwise what fits into the hours")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    parser.add_argument("--experts", choices=EXPERTS, default="sorted", help="implementation of the expert layers")
    parser.add_argument("--dtype", choices=("bf16", "f32"), default="bf16", help="f32 where the CPU has no fast bf16")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "pid").write_text(str(os.getpid()))  # to pause it: kill -STOP, to go on: kill -CONT
    train(MoeRun(args.out, args.experts, args.dtype), args.hours, args.steps)


if __name__ == "__main__":
    main()
