"""The numbers of a decoder that decide its time, from a Hugging Face ``config.json``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

SHIPPED = Path(__file__).with_name("models")
# Their feed-forward layers have an up and a down projection; all others a gate beside.
WITHOUT_GATE = frozenset(
    ["gpt2", "gptj", "gpt_neo", "gpt_neox", "gpt_bigcode", "opt", "bloom", "mpt", "falcon", "phi", "starcoder2", "glam"]
)


# Latent attention, shared experts, dense layers of another width.
UNKNOWN = ("kv_lora_rank", "n_shared_experts", "shared_expert_intermediate_size", "first_k_dense_replace")


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a decoder: layers, widths, heads, experts, bytes of a value."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    ffn_matrices: int = 3
    experts: int = 0
    top_k: int = 0
    expert_period: int = 1
    value_bytes: int = 2

    @classmethod
    def load(cls, source: str | Path | Mapping[str, Any]) -> ModelShape:
        """From a configuration: a mapping, a file, a directory that holds config.json, or a shipped name.

        Raises:
            ValueError: names the field, what was expected and what the configuration has.
        """
        if isinstance(source, Mapping):
            return cls._from_config(source, "config")
        path = Path(source)
        if path.is_dir():
            path = path / "config.json"
        elif not path.is_file():
            path = SHIPPED / f"{source}.json"
            if not path.is_file():
                names = ", ".join(shipped())
                raise ValueError(f"model: expected a config.json, its directory or one of {names}, got {str(source)!r}")
        try:
            config = json.loads(path.read_text())
        except ValueError as error:
            raise ValueError(f"{path}: expected JSON, got {error}") from None
        return cls._from_config(config, str(path))

    @classmethod
    def _from_config(cls, config: Mapping[str, Any], where: str) -> ModelShape:
        def read(*names: str, default: int | None = None) -> int:
            for name in names:
                value = config.get(name)
                if value is None:
                    continue
                if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                    raise ValueError(f"{where}: {name}: expected a positive integer, got {value!r}")
                return value
            if default is None:
                raise ValueError(f"{where}: {' or '.join(names)}: expected a positive integer, got nothing")
            return default

        for name in UNKNOWN:
            if config.get(name):
                raise ValueError(f"{where}: {name}: expected none, which is not modelled, got {config[name]!r}")
        hidden = read("hidden_size", "n_embd", "d_model")
        heads = read("num_attention_heads", "n_head", "num_heads")
        own = 1 if config.get("multi_query") and not config.get("new_decoder_architecture") else heads
        kv_heads = read("num_key_value_heads", "num_kv_heads", default=own) if own > 1 else 1
        if heads % kv_heads:
            raise ValueError(f"{where}: num_key_value_heads: expected a divisor of {heads} heads, got {kv_heads}")
        experts = read("num_local_experts", "num_experts", "n_routed_experts", default=0)
        wide = read("intermediate_size", "n_inner", "ffn_dim", default=4 * hidden)
        top_k = read("num_experts_per_tok", "moe_k", default=0)
        if experts and not 1 <= top_k <= experts:
            raise ValueError(f"{where}: num_experts_per_tok: expected 1 to {experts}, got {top_k or 'nothing'}")
        layers = read("num_hidden_layers", "n_layer", "num_layers")
        period = read("expert_layer_period", "decoder_sparse_step", default=1)
        return cls(
            layers=layers,
            hidden=hidden,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=read("head_dim", default=hidden // heads),
            intermediate=read("moe_intermediate_size", default=wide) if experts else wide,
            vocab=read("vocab_size"),
            ffn_matrices=2 if config.get("model_type") in WITHOUT_GATE else 3,
            experts=experts,
            top_k=top_k,
            expert_period=period,
        )

    def numbers(self) -> dict[str, int]:
        return asdict(self)


def shipped() -> list[str]:
    """Names of the models whose sizes come with effops."""
    return sorted(path.stem for path in SHIPPED.glob("*.json"))
