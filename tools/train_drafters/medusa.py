"""Train Medusa heads on the shipped code model: `python tools/train_drafters/medusa.py --out DIR`.

The model is frozen, so its hidden states are computed once; the heads share its LM head. Muon, cosine, bf16
products. `export.py` turns the result into the shipped directory.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from accept import doc_ranks
from corpus import Corpus, base_model, document_hidden, held_out_documents
from effops.decoding import MedusaHeads
from loss import HeadCrossEntropy, cosine_factor
from torch import Tensor

SEED = 1
HEADS = 3
DECAY = 0.8  # weight of a head against the one before
BLOCK = 128  # neighbouring positions, which share the frozen model's distributions
BLOCKS_PER_STEP = 8
ADAM_LR = 2e-3  # of the biases
LINE_EVERY = 20  # steps


class Blocks:
    """Blocks of BLOCK positions in a new order and from a new border each pass."""

    def __init__(self, count: int, reach: int) -> None:
        self.count, self.reach = count, reach  # positions; how far targets lie beyond one
        self.per_pass = (count - reach) // BLOCK - 1
        self.order = np.zeros(0, dtype=np.int64)
        self.at = -1

    def begin(self, number: int) -> int:
        """First position of block `number` of the whole training."""
        at, index = divmod(number, self.per_pass)
        if at != self.at:
            rng = np.random.default_rng([SEED, at])
            self.order = rng.permutation(self.per_pass) * BLOCK + rng.integers(BLOCK)
            self.at = at
        return int(self.order[index])


def build_optimizers(heads: MedusaHeads, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for each head's matrices, AdamW for the biases."""
    matrices = []
    for parameter in heads.parameters():
        parameter.grad = torch.zeros_like(parameter)
        if parameter is heads.bias:
            continue
        size = parameter.shape[-1]
        parts = zip(parameter.data.view(-1, size, size), parameter.grad.view(-1, size, size), strict=True)
        for part, gradient in parts:
            matrix = torch.nn.Parameter(part)  # shares the parameter's memory, and its gradient's
            matrix.grad = gradient
            matrices.append(matrix)
    muon = torch.optim.Muon(matrices, lr=lr, weight_decay=0.01, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    adam = torch.optim.AdamW([heads.bias], lr=ADAM_LR, betas=(0.9, 0.98), weight_decay=0.0)
    for optimizer in (muon, adam):
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return [muon, adam]


def train(out: Path, layers: int, passes: float, lr: float, share: float, limit: int | None) -> None:
    """Train and write the heads in float32 with the record of the training."""
    torch.manual_seed(SEED)
    corpus = Corpus(out)
    tokens, left, hidden = (x[:limit] for x in (corpus.tokens, corpus.left, corpus.hidden))
    lm_head = base_model(torch.bfloat16).lm_head.weight
    heads = MedusaHeads(hidden.shape[1], HEADS, layers, projection=True, root=True)
    optimizers = build_optimizers(heads, lr)
    blocks = Blocks(len(tokens), HEADS + 1)
    steps = int(blocks.per_pass * passes) // BLOCKS_PER_STEP
    ahead = torch.arange(2, HEADS + 2)[:, None]
    scales = DECAY ** torch.arange(HEADS) / (BLOCK * BLOCKS_PER_STEP)

    curve: list[tuple[int, list[float]]] = []
    sums, counts = torch.zeros(HEADS), torch.zeros(HEADS)
    started = time.monotonic()
    for step in range(steps):
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * cosine_factor(step, steps)
        places = [blocks.begin(step * BLOCKS_PER_STEP + i) for i in range(BLOCKS_PER_STEP)]
        rows = torch.tensor(places)[:, None] + torch.arange(BLOCK)
        with torch.autocast("cpu", torch.bfloat16):
            root = lm_head[tokens[(rows + 1).clamp(max=len(tokens) - 1)]]  # tied: the embedding
            z = heads.states(hidden[rows], root.float()).to(torch.bfloat16)
        leaf = z.detach().requires_grad_()
        for i, begin in enumerate(places):
            at = begin + torch.arange(BLOCK)
            targets = torch.where(left[at] >= ahead, tokens[at + ahead], -1)
            following = hidden[begin + 1 : begin + BLOCK + HEADS]
            teacher = torch.softmax(following @ lm_head.t(), -1) if share else following
            loss, nats = HeadCrossEntropy.apply(leaf[:, i], lm_head, targets, teacher, share, scales)
            loss.backward()
            sums += nats.sum(1)
            counts += (targets >= 0).sum(1)
        z.backward(leaf.grad)
        torch.nn.utils.clip_grad_norm_(heads.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        for parameter in heads.parameters():
            parameter.grad.zero_()
        if step % LINE_EVERY == LINE_EVERY - 1 or step == steps - 1:
            nats_per_head = [round(x, 4) for x in (sums / counts).tolist()]
            done = (step + 1) * BLOCK * BLOCKS_PER_STEP
            curve.append((done, nats_per_head))
            sums.zero_(), counts.zero_()
            speed = done / (time.monotonic() - started)
            minutes = (steps - step - 1) * BLOCK * BLOCKS_PER_STEP / speed / 60
            print(
                f"step {step + 1}/{steps}  nats {' '.join(f'{x:.3f}' for x in nats_per_head)}  "
                f"{speed:.0f} positions/s  {minutes:.1f} min left",
                flush=True,
            )
    heads.save_pretrained(out / "medusa")
    record = {
        "steps": steps,
        "positions": steps * BLOCK * BLOCKS_PER_STEP,
        "passes": passes,
        "seconds": round(time.monotonic() - started),
        "layers": layers,
        "lr": lr,
        "decay": DECAY,
        "soft_share": share,
        "torch_version": torch.__version__,
        "final_nats": curve[-1][1],
        "curve": curve,
    }
    (out / "medusa" / "record.json").write_text(json.dumps(record) + "\n")
    quick_score(heads, lm_head)


def quick_score(heads: MedusaHeads, lm_head: Tensor) -> None:
    """Print the accuracy of each head on the calibration files."""
    model = base_model()
    ranks = torch.cat(
        [
            doc_ranks(heads, lm_head.float(), document_hidden(model, ids), ids)
            for ids in held_out_documents(calibration=True).values()
        ],
        1,
    )
    for top in (1, 3, 10):
        shares = [(row[row >= 0] < top).float().mean().item() for row in ranks]
        print(f"calibration files, top {top}: {' '.join(f'{x:.4f}' for x in shares)}", flush=True)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory of the hidden states and of the result")
    parser.add_argument("--layers", type=int, default=1, help="residual layers of a head")
    parser.add_argument("--passes", type=float, default=3.0, help="passes over the training text")
    parser.add_argument("--lr", type=float, default=1e-2, help="peak learning rate of the matrices")
    parser.add_argument("--soft", type=float, default=0.7, help="share of the frozen model's distribution in a target")
    parser.add_argument("--limit", type=int, help="first positions of the text alone, for a trial")
    args = parser.parse_args()
    torch.set_num_threads(1)
    train(args.out, args.layers, args.passes, args.lr, args.soft, args.limit)


if __name__ == "__main__":
    main()
