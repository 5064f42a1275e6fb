"""Train the draft model, a Llama of less than 1M parameters: `python tools/train_drafters/draft.py --out DIR`.

It learns the training text and, for a share of each target, the shipped code model's distribution. Muon for the
matrices, AdamW for the tied embedding and the norms, bf16 products. `export.py` turns the result into the shipped
directory.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import torch
from corpus import BASE, Corpus, base_model, document_hidden, held_out_documents
from loss import HeadCrossEntropy, cosine_factor
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

SEED = 2
TOKENS_PER_STEP = 4096
TOKENS_PER_PASS = 2048  # one forward and backward
CHUNK = 256  # positions whose distributions over the vocabulary exist at once
# (share of the steps, sequence length): the full context comes last, when the rest is learned.
LENGTHS = ((0.60, 256), (0.25, 1024), (0.15, 2048))
MUON_LR, ADAM_LR = 1e-2, 5e-3
LINE_EVERY = 20  # steps


def build_model() -> LlamaForCausalLM:
    """A fresh draft model in float32 with the code model's vocabulary and context."""
    base = LlamaConfig.from_pretrained(BASE)
    config = LlamaConfig(
        vocab_size=base.vocab_size,
        hidden_size=128,
        intermediate_size=448,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,
        max_position_embeddings=base.max_position_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
        bos_token_id=base.bos_token_id,
        eos_token_id=base.eos_token_id,
        pad_token_id=base.pad_token_id,
        attn_implementation="sdpa",
        use_cache=False,
    )
    model = LlamaForCausalLM(config)
    for layer in model.model.layers:
        for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
            linear.weight.data.mul_(1 / math.sqrt(2 * config.num_hidden_layers))
    return model


def build_optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for every matrix of the layers; AdamW for the tied embedding and the norms."""
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    muon = torch.optim.Muon(matrices, lr=MUON_LR, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    adam = torch.optim.AdamW(others, lr=ADAM_LR, betas=(0.9, 0.98), weight_decay=0.0)
    for optimizer in (muon, adam):
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return [muon, adam]


def length_at(step: int, steps: int) -> int:
    """Sequence length of a step."""
    done = 0.0
    for share, length in LENGTHS:
        done += share
        if step < round(steps * done):
            return length
    return LENGTHS[-1][1]


class Rows:
    """Positions of training sequences: each pass cuts the text from another border and takes every row once."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.generator = torch.Generator().manual_seed(SEED)
        self.length = 0
        self.begins = torch.zeros(0, dtype=torch.int64)

    def take(self, rows: int, length: int) -> Tensor:
        """Positions int64 [rows, length]."""
        if length != self.length or len(self.begins) < rows:
            border = torch.randint(length, (1,), generator=self.generator)
            places = torch.randperm(self.count // length - 1, generator=self.generator)
            self.length, self.begins = length, places * length + border
        chosen, self.begins = self.begins[:rows], self.begins[rows:]
        return chosen[:, None] + torch.arange(length)


def train(out: Path, passes: float, share: float) -> None:
    """Train and write the model in float32 with the record of the training."""
    torch.manual_seed(SEED)
    corpus = Corpus(out)
    lm_head = base_model(torch.bfloat16).lm_head.weight
    model = build_model()
    optimizers = build_optimizers(model)
    steps = int(len(corpus.tokens) * passes) // TOKENS_PER_STEP
    scales = torch.ones(1) / TOKENS_PER_STEP
    rows = Rows(len(corpus.tokens) - 1)

    curve: list[tuple[int, float]] = []
    nats_sum = nats_count = 0.0
    started = time.monotonic()
    for step in range(steps):
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * cosine_factor(step, steps)
        length = length_at(step, steps)
        for _ in range(TOKENS_PER_STEP // TOKENS_PER_PASS):
            at = rows.take(TOKENS_PER_PASS // length, length)
            with torch.autocast("cpu", torch.bfloat16):
                hidden = model.model(input_ids=corpus.tokens[at]).last_hidden_state
            at = at.flatten()
            targets = torch.where(corpus.left[at] >= 1, corpus.tokens[at + 1], -1)  # none beyond a document
            leaf = hidden.detach().view(1, len(at), -1).to(torch.bfloat16).requires_grad_()
            weight = model.lm_head.weight.detach().to(torch.bfloat16).requires_grad_()
            for begin in range(0, len(at), CHUNK):
                part = slice(begin, begin + CHUNK)
                teacher = torch.softmax(corpus.hidden[at[part]] @ lm_head.t(), -1)
                loss, nats = HeadCrossEntropy.apply(leaf[:, part], weight, targets[None, part], teacher, share, scales)
                loss.backward()
                nats_sum += nats.sum().item()
            nats_count += (targets >= 0).sum().item()
            hidden.backward(leaf.grad.view_as(hidden).to(hidden.dtype))
            embedding = model.lm_head.weight
            embedding.grad += weight.grad
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if step % LINE_EVERY == LINE_EVERY - 1 or step == steps - 1:
            done = (step + 1) * TOKENS_PER_STEP
            curve.append((done, round(nats_sum / nats_count, 4)))
            nats_sum = nats_count = 0.0
            speed = done / (time.monotonic() - started)
            minutes = (steps - step - 1) * TOKENS_PER_STEP / speed / 60
            print(
                f"step {step + 1}/{steps}  {curve[-1][1]:.3f} nats  {speed:.0f} tokens/s  {minutes:.1f} min left",
                flush=True,
            )
    model.config.use_cache = True
    model.save_pretrained(out / "draft")
    record = {
        "steps": steps,
        "tokens": steps * TOKENS_PER_STEP,
        "passes": passes,
        "seconds": round(time.monotonic() - started),
        "muon_lr": MUON_LR,
        "adam_lr": ADAM_LR,
        "soft_share": share,
        "torch_version": torch.__version__,
        "final_nats": curve[-1][1],
        "curve": curve,
    }
    (out / "draft" / "record.json").write_text(json.dumps(record) + "\n")
    quick_score(model)


@torch.inference_mode()
def quick_score(model: LlamaForCausalLM) -> None:
    """Print how often the draft's first guess is the token, and the code model's first guess, on calibration files."""
    base = base_model()
    true = same = count = 0
    for ids in held_out_documents(calibration=True).values():
        guess = model.lm_head(document_hidden(model, ids)).argmax(-1)[:-1]
        theirs = base.lm_head(document_hidden(base, ids)).argmax(-1)[:-1]
        true += (guess == ids[1:]).sum().item()
        same += (guess == theirs).sum().item()
        count += len(guess)
    print(f"calibration files: the token {true / count:.4f}, the code model's guess {same / count:.4f}", flush=True)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory of the hidden states and of the result")
    parser.add_argument("--passes", type=float, default=3.0, help="passes over the training text")
    parser.add_argument("--soft", type=float, default=0.7, help="share of the code model's distribution in a target")
    args = parser.parse_args()
    torch.set_num_threads(1)
    train(args.out, args.passes, args.soft)


if __name__ == "__main__":
    main()
