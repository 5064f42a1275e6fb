"""Train the small code model that effops ships: `python tools/train_code_model/train.py --out DIR --hours H`.

Plain transformers and torch: bf16 autocast on one core, Muon for the matrices, AdamW for the rest. The
number of tokens is fixed from the measured speed, sequences grow from 256 to 2048 tokens, and the learning
rate falls linearly to zero. Run the same command again to go on from the last checkpoint; `export.py` turns
the checkpoint into the shipped directory.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from data import encode_documents, read_source, stdlib_dir, train_tokenizer, training_files
from evaluate import bits_per_byte
from model import Progress, build_model, build_optimizers, load_checkpoint, lr_factor, save_checkpoint, update
from sampling import Sampler, stage_at
from tokenizers import Tokenizer

SEED = 1
TOKENS_PER_STEP = 8192
TOKENS_PER_PASS = 2048  # one forward and backward; small enough for the caches
EAGER_UP_TO = 256  # up to this length compiled matrix products beat the flash kernel on CPU
TIMED_STEPS = (3, 9)  # steps whose speed fixes the number of tokens
LONGER_SEQUENCES_COST = 1.17  # whole run against the same tokens at the first length
LINE_EVERY, SAVE_EVERY, SCORE_EVERY = 10, 50, 100  # steps
QUICK_MODULES = ("textwrap", "heapq", "queue", "graphlib", "colorsys")  # scored while training


class Run:
    """A training run in a directory: data, model, optimizers and how far it came."""

    def __init__(self, out: Path, dtype: str = "bf16") -> None:
        out.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(SEED)
        root = stdlib_dir()
        texts = [read_source(root / path) for path in training_files()]
        tokenizer = self.tokenizer(out, texts)
        self.sampler = Sampler(encode_documents(tokenizer, texts), SEED)
        quick = [read_source(root / f"{name}.py") for name in QUICK_MODULES]
        self.quick_documents = encode_documents(tokenizer, quick)
        self.quick_bytes = sum(len(text.encode()) for text in quick)
        self.dtype = dtype
        self.model, self.optimizers = self.build(tokenizer)
        self.checkpoint = out / "checkpoint.pt"
        self.progress = Progress(dtype=dtype)
        if self.checkpoint.exists():
            self.progress = load_checkpoint(self.checkpoint, self.model, self.optimizers)
        self.losses = torch.compile(self.objective, dynamic=False) if self.compiled() else self.objective

    def tokenizer(self, out: Path, texts: list[str]) -> Tokenizer:
        """The run's tokenizer: trained on the training split once, then read back."""
        path = out / "tokenizer.json"
        if not path.exists():
            train_tokenizer(texts).save(str(path))
        return Tokenizer.from_file(str(path))

    def build(self, tokenizer: Tokenizer) -> tuple[torch.nn.Module, list[torch.optim.Optimizer]]:
        """The model and its optimizers."""
        model = build_model(tokenizer)
        return model, build_optimizers(model)

    def compiled(self) -> bool:
        """Whether the loss is compiled."""
        return True

    def objective(self, inputs: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What is minimised, and the nats per token that are reported; here they are the same."""
        with torch.autocast("cpu", torch.bfloat16):
            logits = self.model.lm_head(self.model.model(input_ids=inputs).last_hidden_state)
        nats = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
        return nats, nats

    def step(self) -> float:
        """One optimizer step; returns the mean loss in nats per token."""
        progress = self.progress
        stage, first_step, length = stage_at(progress.step, progress.total_steps)
        self.model.set_attn_implementation("eager" if length <= EAGER_UP_TO else "sdpa")
        passes, rows = TOKENS_PER_STEP // TOKENS_PER_PASS, TOKENS_PER_PASS // length
        loss_sum = 0.0
        for i in range(passes):
            first_row = ((progress.step - first_step) * passes + i) * rows
            loss, nats = self.losses(*self.sampler.batch(stage, first_row, rows, length))
            (loss / passes).backward()
            loss_sum += nats.item() / passes
        update(self.model, self.optimizers, lr_factor(progress.step, progress.total_steps))
        progress.step += 1
        return loss_sum

    def score(self) -> float:
        """Held-out bits per byte on the quick modules, noted in the progress."""
        with torch.autocast("cpu", torch.bfloat16, enabled=self.dtype == "bf16"):
            bpb = bits_per_byte(self.model, self.quick_documents, self.quick_bytes, context=1024, stride=1024)
        self.progress.held_out.append((self.progress.step * TOKENS_PER_STEP, round(bpb, 4)))
        return bpb

    def save(self) -> None:
        """Write the checkpoint."""
        save_checkpoint(self.checkpoint, self.model, self.optimizers, self.progress)


def train(run: Run, hours: float, steps: int = 0) -> None:
    """Train for `steps`, or where it is 0 until the tokens that fit into `hours` are used; prints a line every few
    steps."""
    progress = run.progress
    progress.total_steps = progress.total_steps or steps
    parameters = sum(p.numel() for p in run.model.parameters())
    print(
        f"{parameters:,} parameters, {run.sampler.epoch_tokens:,} tokens an epoch, step {progress.step}",
        flush=True,
    )
    losses: list[float] = []
    times: list[float] = []
    while not progress.total_steps or progress.step < progress.total_steps:
        started = time.monotonic()
        losses.append(run.step())
        times = [*times[-19:], time.monotonic() - started]
        progress.seconds += times[-1]
        tokens = progress.step * TOKENS_PER_STEP
        if not progress.total_steps and progress.step >= TIMED_STEPS[1]:
            step_seconds = float(np.median(times[TIMED_STEPS[0] :])) * LONGER_SEQUENCES_COST
            progress.total_steps = int((hours * 3600 - progress.seconds) / step_seconds)
            print(
                f"{progress.total_steps} steps fit, {progress.total_steps * TOKENS_PER_STEP:,} tokens",
                flush=True,
            )
        last = progress.step == progress.total_steps
        if progress.step % LINE_EVERY == 0 or last:
            progress.losses.append((tokens, round(float(np.mean(losses)), 4)))
            losses.clear()
            seconds = float(np.median(times))
            minutes_left = (progress.total_steps - progress.step) * seconds / 60
            print(
                f"step {progress.step}/{progress.total_steps}  {tokens:,} tokens  "
                f"loss {progress.losses[-1][1]:.4f}  {TOKENS_PER_STEP / seconds:.0f} tokens/s  "
                f"{minutes_left:.0f} min left",
                flush=True,
            )
        if progress.step % SCORE_EVERY == 0 or last:
            print(f"held-out {run.score():.4f} bits per byte ({', '.join(QUICK_MODULES)})", flush=True)
        if progress.step % SAVE_EVERY == 0 or last:
            run.save()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory of the checkpoint; goes on if one is there")
    parser.add_argument("--hours", type=float, default=1.5, help="wall time that fixes the number of tokens")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    train(Run(args.out), args.hours)


if __name__ == "__main__":
    main()
