"""The parts of a configuration that only mixtures of experts and latent attention have."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Fields = Mapping[str, Any]

# What a family's configuration means where the file is silent (the defaults of its Transformers class).
MOE_DEFAULTS: dict[str, dict[str, Any]] = {
    "mixtral": {
        "max_position_embeddings": 131072, "num_key_value_heads": 8, "num_experts": 8, "num_experts_per_tok": 2,
        "rms_norm_eps": 1e-5, "rope_theta": 1000000.0, "eos_token_id": 2,
    },
    "qwen2_moe": {
        "max_position_embeddings": 32768, "num_key_value_heads": 16, "sliding_window": 4096, "num_experts": 60,
        "num_experts_per_tok": 4, "moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632,
        "norm_topk_prob": False,
    },
    "qwen3_moe": {
        "max_position_embeddings": 32768, "num_key_value_heads": 4, "sliding_window": 4096, "num_experts": 128,
        "num_experts_per_tok": 8, "moe_intermediate_size": 768, "norm_topk_prob": False,
    },
    "olmoe": {
        "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "num_experts": 64, "num_experts_per_tok": 8,
        "norm_topk_prob": False, "eos_token_id": 50279,
    },
    "deepseek_v2": {
        "max_position_embeddings": 2048, "num_experts": 64, "moe_intermediate_size": 1407, "n_shared_experts": 2,
        "routed_scaling_factor": 1.0, "topk_method": "greedy", "norm_topk_prob": False, "first_k_dense_replace": 0,
        "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
        "eos_token_id": 2,
    },
    "deepseek_v3": {
        "max_position_embeddings": 4096, "num_experts": 256, "num_experts_per_tok": 8, "moe_intermediate_size": 2048,
        "n_shared_experts": 1, "routed_scaling_factor": 2.5, "n_group": 8, "topk_group": 4, "norm_topk_prob": True,
        "first_k_dense_replace": 3, "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64, "v_head_dim": 128, "rope_interleave": True, "eos_token_id": 1,
    },
}  # fmt: skip

EXPERT_COUNTS = ("num_local_experts", "n_routed_experts", "num_experts")  # names of one field


@dataclass(frozen=True)
class ExpertsConfig:
    """Experts and router of the layers that have them; ``effops.nn.MoE`` and ``Router`` explain the fields.

    ``dense_layers`` have an MLP of the model's ``intermediate_size`` instead.
    """

    num_experts: int
    experts_per_token: int
    intermediate_size: int
    scoring: str = "softmax"
    renormalize: bool = True
    scale: float = 1.0
    selection_bias: bool = False
    groups: int = 1
    topk_group: int = 1
    group_score: str = "max"
    shared_size: int = 0
    shared_gate: bool = False
    dense_layers: tuple[int, ...] = ()

    def router_options(self) -> dict[str, Any]:
        """The options of ``effops.nn.Router``."""
        names = ("scoring", "renormalize", "scale", "selection_bias", "groups", "topk_group", "group_score")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class LatentConfig:
    """Ranks and head sizes of multi-head latent attention, under their Hugging Face names."""

    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    rope_interleave: bool = True

    def score_scale(self, rope: Fields) -> float:
        """What multiplies the scores: scaled rotary embeddings may sharpen them (``mscale_all_dim``, YaRN)."""
        scale = (self.qk_nope_head_dim + self.qk_rope_head_dim) ** -0.5
        weight, factor = rope.get("mscale_all_dim") or 0.0, rope.get("factor") or 1.0
        if rope["rope_type"] != "default" and weight and factor > 1:
            scale *= (0.1 * weight * math.log(factor) + 1.0) ** 2
        return float(scale)


def read_experts(kind: str, given: Fields, fail: Callable[[str, str], Exception]) -> ExpertsConfig | None:
    """The experts of a configuration; ``fail(field, detail)`` makes the error."""
    if kind not in MOE_DEFAULTS:
        return None

    def size(name: str, value: Any) -> int:
        if not isinstance(value, int) or value <= 0:
            raise fail(name, f"expected a positive integer, got {value!r}")
        return value

    # A family's default stands under num_experts, a file may use any of the names.
    count = size("num_experts", next((given[name] for name in EXPERT_COUNTS if name in given), None))
    choices = size("num_experts_per_tok", given.get("num_experts_per_tok"))
    if choices > count:
        raise fail("num_experts_per_tok", f"expected at most num_experts ({count}), got {choices}")
    width = "intermediate_size" if kind in ("mixtral", "olmoe") else "moe_intermediate_size"
    common: dict[str, Any] = {
        "num_experts": count, "experts_per_token": choices, "intermediate_size": size(width, given.get(width)),
    }  # fmt: skip
    if kind == "mixtral":
        return ExpertsConfig(**common)
    common["renormalize"] = bool(given["norm_topk_prob"])
    if kind == "olmoe":
        return ExpertsConfig(**common)
    layers = given.get("num_hidden_layers")
    layers = layers if isinstance(layers, int) else 0
    if kind in ("qwen2_moe", "qwen3_moe"):
        step, excluded = given.get("decoder_sparse_step", 1), set(given.get("mlp_only_layers", ()))
        step = size("decoder_sparse_step", step)
        common["dense_layers"] = tuple(i for i in range(layers) if i in excluded or (i + 1) % step)
        if kind == "qwen2_moe":
            common["shared_size"] = size("shared_expert_intermediate_size", given["shared_expert_intermediate_size"])
            common["shared_gate"] = True
        return ExpertsConfig(**common)
    common["dense_layers"] = tuple(range(min(layers, given["first_k_dense_replace"])))
    common["shared_size"] = common["intermediate_size"] * given.get("n_shared_experts", 0)
    common["scale"] = float(given["routed_scaling_factor"])
    if kind == "deepseek_v2":
        if common["renormalize"]:
            raise fail("norm_topk_prob", "expected false, got true")
        if given["topk_method"] not in ("greedy", "group_limited_greedy"):
            raise fail("topk_method", f"expected greedy or group_limited_greedy, got {given['topk_method']!r}")
        if given["topk_method"] == "greedy":
            return ExpertsConfig(**common)
        score: dict[str, Any] = {"group_score": "max"}
    else:
        score = {"group_score": "top2", "scoring": "sigmoid", "selection_bias": True}
    groups, chosen = (size(name, given.get(name)) for name in ("n_group", "topk_group"))
    if count % groups or not chosen <= groups:
        raise fail("n_group", f"expected a divisor of {count} and at least topk_group ({chosen}), got {groups}")
    return ExpertsConfig(**common, **score, groups=groups, topk_group=chosen)


def read_latent(kind: str, given: Fields, raw: Fields, fail: Callable[[str, str], Exception]) -> LatentConfig | None:
    """The latent attention of a configuration; ``raw`` tells an explicit null of ``q_lora_rank`` from silence."""
    if not kind.startswith("deepseek"):
        return None
    names = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    for name in names:
        if not isinstance(given[name], int) or given[name] <= 0:
            raise fail(name, f"expected a positive integer, got {given[name]!r}")
    q_rank = None if "q_lora_rank" in raw and raw["q_lora_rank"] is None else given["q_lora_rank"]
    sizes = {name: given[name] for name in names}
    return LatentConfig(q_lora_rank=q_rank, **sizes, rope_interleave=bool(given.get("rope_interleave", True)))


def experts_to_dict(kind: str, experts: ExpertsConfig, layers: int) -> dict[str, Any]:
    """The fields that :func:`read_experts` reads."""
    count = {"mixtral": "num_local_experts", "qwen3_moe": "num_local_experts"}.get(
        kind, "n_routed_experts" if kind.startswith("deepseek") else "num_experts"
    )
    raw: dict[str, Any] = {count: experts.num_experts, "num_experts_per_tok": experts.experts_per_token}
    if kind == "qwen3_moe":
        raw["num_experts"] = experts.num_experts  # its older name
    if kind != "mixtral":
        raw["norm_topk_prob"] = experts.renormalize
    if kind not in ("mixtral", "olmoe"):
        raw["moe_intermediate_size"] = experts.intermediate_size
    if kind in ("qwen2_moe", "qwen3_moe"):
        raw |= {"decoder_sparse_step": 1, "mlp_only_layers": list(experts.dense_layers)}
    if kind == "qwen2_moe":
        raw["shared_expert_intermediate_size"] = experts.shared_size
    if kind.startswith("deepseek"):
        raw |= {
            "first_k_dense_replace": len(experts.dense_layers), "routed_scaling_factor": experts.scale,
            "n_shared_experts": experts.shared_size // experts.intermediate_size,
            "n_group": experts.groups, "topk_group": experts.topk_group,
        }  # fmt: skip
    if kind == "deepseek_v2":
        raw["topk_method"] = "greedy" if experts.groups == 1 else "group_limited_greedy"
    if kind == "deepseek_v3":
        raw["num_nextn_predict_layers"] = 0
    return raw
