"""The mixture-of-experts code model, its router and its optimizers."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from data import BOS, EOS, PAD
from experts import sorted_experts_forward
from model import ADAM_LR, CONTEXT, MUON_LR, WEIGHT_DECAY
from muon import StackedMuon
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

BALANCE, Z = 0.01, 0.001  # coefficients of the auxiliary losses
EXPERTS = ("sorted", "eager", "effops")  # implementations of the expert layer


class Router(nn.Module):
    """Mixtral's router in float32, which keeps its logits [N,E] and ids [N,K] for the losses."""

    def __init__(self, gate: nn.Module, effops: bool) -> None:
        super().__init__()
        self.weight, self.top_k, self.effops = gate.weight, gate.top_k, effops
        self.seen: tuple[Tensor, Tensor] | None = None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [N,d] to logits, weights and ids."""
        with torch.autocast("cpu", enabled=False):
            logits = F.linear(x.float(), self.weight.float())
            if self.effops:
                from effops import ops

                weights, ids = ops.topk_routing(logits, self.top_k)
            else:
                weights, ids = logits.softmax(-1).topk(self.top_k)
                weights = weights / weights.sum(-1, keepdim=True)
        self.seen = (logits, ids)
        return logits, weights, ids


def build_model(tokenizer: Tokenizer, experts: str = "sorted", **changes: int) -> MixtralForCausalLM:
    """A fresh model in float32, of other sizes where ``changes`` say so; residual outputs start small so that depth
    does not raise the variance."""
    if experts == "effops":
        import effops.integrations.transformers as integration

        integration.register()
    ALL_EXPERTS_FUNCTIONS.register("sorted", sorted_experts_forward)
    sizes = {
        "hidden_size": 256,
        "intermediate_size": 192,
        "num_hidden_layers": 5,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        **changes,
    }
    config = MixtralConfig(
        **sizes,
        vocab_size=tokenizer.get_vocab_size(),
        router_aux_loss_coef=BALANCE,
        max_position_embeddings=CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.token_to_id(BOS),
        eos_token_id=tokenizer.token_to_id(EOS),
        pad_token_id=tokenizer.token_to_id(PAD),
        attn_implementation="sdpa",
        experts_implementation=experts,
        use_cache=False,
    )
    model = MixtralForCausalLM(config)
    for layer in model.model.layers:
        for weight in (layer.self_attn.o_proj.weight, layer.mlp.experts.down_proj):
            weight.data.mul_(1 / math.sqrt(2 * config.num_hidden_layers))
        layer.mlp.gate = Router(layer.mlp.gate, experts == "effops")
    return model


def build_optimizers(
    model: MixtralForCausalLM, muon_dtype: torch.dtype = torch.bfloat16
) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of attention and experts; AdamW for the tied embedding, the routers and the norms."""
    gate_up, matrices, others = [], [], []
    for name, parameter in model.named_parameters():
        if name.endswith("experts.gate_up_proj"):
            gate_up.append(parameter)
        elif parameter.ndim >= 2 and ".layers." in name and not name.endswith("mlp.gate.weight"):
            matrices.append(parameter)
        else:
            others.append(parameter)
    groups = [{"params": gate_up, "parts": 2}, {"params": matrices}]
    muon = StackedMuon(groups, lr=MUON_LR, weight_decay=WEIGHT_DECAY, dtype=muon_dtype)
    adam = torch.optim.AdamW(others, lr=ADAM_LR, betas=(0.9, 0.95), weight_decay=0.0)
    for optimizer in (muon, adam):
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return [muon, adam]


def router_losses(model: MixtralForCausalLM) -> tuple[Tensor, Tensor]:
    """Of the last forward pass: Switch's balance loss (uniform = 1) and the z-loss, means over the layers."""
    balance, z = [], []
    for layer in model.model.layers:
        logits, ids = layer.mlp.gate.seen
        experts = logits.shape[1]
        share = F.one_hot(ids.long(), experts).float().mean((0, 1))
        balance.append(experts * (share * logits.softmax(-1).mean(0)).sum())
        z.append(logits.logsumexp(-1).square().mean())
    return torch.stack(balance).mean(), torch.stack(z).mean()


def objective(
    model: MixtralForCausalLM, inputs: Tensor, targets: Tensor, precise: bool = False
) -> tuple[Tensor, Tensor]:
    """Cross entropy with the router's losses, and cross entropy alone; in bf16 unless ``precise``."""
    with torch.autocast("cpu", torch.bfloat16, enabled=not precise):
        logits = model.lm_head(model.model(input_ids=inputs).last_hidden_state)
    nats = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
    balance, z = router_losses(model)
    return nats + BALANCE * balance + Z * z, nats
