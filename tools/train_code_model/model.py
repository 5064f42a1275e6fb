"""The code model, its optimizers and its checkpoint."""

from __future__ import annotations

import math
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from data import BOS, EOS, PAD
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

CONTEXT = 2048
MUON_LR, ADAM_LR = 4e-3, 3e-3
WARMUP_STEPS = 40
WEIGHT_DECAY = 0.1


@dataclass
class Progress:
    """State of a run that is not in the model or the optimizers; goes into every checkpoint."""

    step: int = 0
    total_steps: int = 0  # 0 until the speed is measured
    seconds: float = 0.0
    losses: list[tuple[int, float]] = field(default_factory=list)  # (tokens, mean nats since the last)
    held_out: list[tuple[int, float]] = field(default_factory=list)  # (tokens, bits per byte, quick set)
    dtype: str = "bf16"  # of the matrix products


def build_model(tokenizer: Tokenizer) -> LlamaForCausalLM:
    """A fresh model in float32; residual outputs start small so that depth does not raise the variance."""
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.token_to_id(BOS),
        eos_token_id=tokenizer.token_to_id(EOS),
        pad_token_id=tokenizer.token_to_id(PAD),
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
    muon = torch.optim.Muon(
        matrices, lr=MUON_LR, weight_decay=WEIGHT_DECAY, momentum=0.95, adjust_lr_fn="match_rms_adamw"
    )
    adam = torch.optim.AdamW(others, lr=ADAM_LR, betas=(0.9, 0.95), weight_decay=0.0)
    for optimizer in (muon, adam):
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return [muon, adam]


def lr_factor(step: int, total_steps: int) -> float:
    """Share of the peak learning rate: linear warm-up, then linear to zero at total_steps."""
    if step < WARMUP_STEPS or not total_steps:
        return min(1.0, (step + 1) / WARMUP_STEPS)
    return (total_steps - step) / (total_steps - WARMUP_STEPS)


def update(model: torch.nn.Module, optimizers: list[torch.optim.Optimizer], factor: float) -> None:
    """One step of the optimizers at this share of the peak learning rates; gradients are clipped, then cleared."""
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
        optimizer.step()
        optimizer.zero_grad()


def save_checkpoint(
    path: Path, model: torch.nn.Module, optimizers: list[torch.optim.Optimizer], progress: Progress
) -> None:
    """Everything needed to go on; written under a temporary name and moved."""
    state = {
        "model": model.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        "progress": asdict(progress),
    }
    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    os.replace(temporary, path)


def load_checkpoint(
    path: Path, model: torch.nn.Module, optimizers: list[torch.optim.Optimizer] | None = None
) -> Progress:
    """Read what save_checkpoint wrote into `model` and, to go on training, into `optimizers`."""
    state = torch.load(path, weights_only=True)
    model.load_state_dict(state["model"])
    if optimizers is not None:
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
    return Progress(**state["progress"])
