"""The numbers of a decoder that decide its time, from a Hugging Face ``config.json``."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

SHIPPED = Path(__file__).with_name("models")
# Their feed-forward layers have an up and a down projection; all others a gate beside.
WITHOUT_GATE = frozenset(
    [
        *("gpt2", "gptj", "gpt_neo", "gpt_neox", "gpt_neox_japanese", "gpt_bigcode", "openai-gpt", "codegen", "opt"),
        *("bloom", "mpt", "falcon", "phi", "starcoder2", "glam", "nemotron", "persimmon", "arcee", "apertus", "biogpt"),
        *("jais2", "nanochat"),
    ]
)
# Latent attention, shared experts, dense layers of another width or at other places, layers without attention.
UNKNOWN = (
    *("kv_lora_rank", "n_shared_experts", "num_shared_experts", "moe_num_shared_experts", "moe_num_experts"),
    *("shared_expert_intermediate_size", "shared_intermediate_size", "intermediate_size_mlp", "first_k_dense_replace"),
    *("attn_layer_indices", "hybrid_override_pattern", "mamba_d_state", "state_size", "conv_L_cache"),
)
# Lists with an entry a layer, and the entries that are modelled.
LAYERS = ("layer_types", "layers_block_type", "block_types", "attention_layers")
MODELLED = ("full_attention", "attention", "global")
WINDOWED = ("sliding_attention", "local")  # full attention where the window holds every position


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
        if not isinstance(config, dict):
            raise ValueError(f"{path}: expected an object, got {type(config).__name__}")
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
        expert_wide = read("moe_intermediate_size", default=wide) if experts else wide
        for problem in _not_modelled(config, layers, experts):
            raise ValueError(f"{where}: {problem}")
        if experts and period > 1 and expert_wide != wide:  # dense layers have a width of their own
            expected = f"intermediate_size ({wide}) where one layer of {period} has experts"
            raise ValueError(f"{where}: moe_intermediate_size: expected {expected}, got {expert_wide}")
        return cls(
            layers=layers,
            hidden=hidden,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=read("head_dim", default=hidden // heads),
            intermediate=expert_wide,
            vocab=read("vocab_size"),
            ffn_matrices=2 if config.get("model_type") in WITHOUT_GATE else 3,
            experts=experts,
            top_k=top_k,
            expert_period=period,
        )

    def numbers(self) -> dict[str, int]:
        return asdict(self)


def _not_modelled(config: Mapping[str, Any], layers: int, experts: int) -> Iterator[str]:
    """What a configuration has that would change its time and is not in a `ModelShape`."""
    for name in UNKNOWN:
        if config.get(name):
            yield f"{name}: expected none, which is not modelled, got {config[name]!r}"
    if config.get("attn_layer_period") not in (None, 1):
        yield f"attn_layer_period: expected 1, attention in every layer, got {config['attn_layer_period']!r}"
    if experts and config.get("mlp_only_layers"):
        yield f"mlp_only_layers: expected none beside experts, got {config['mlp_only_layers']!r}"
    name, window, listed = "sliding_window", config.get("sliding_window"), False
    if window is None and config.get("window_size") is not None:
        name, window = "window_size", config["window_size"]
    positions = config.get("max_position_embeddings")
    cuts = not (isinstance(window, int) and isinstance(positions, int) and window >= positions)
    for of_layers in LAYERS:
        for kind in config.get(of_layers) or ():
            listed = True
            if kind not in MODELLED and (cuts or kind not in WINDOWED):
                yield f"{of_layers}: expected {' or '.join(MODELLED)}, got {kind!r}"
    # Without a list all layers have the window, Qwen's from `max_window_layers` on and only where it is switched on.
    used = config.get("use_sliding_window", not str(config.get("model_type", "")).startswith("qwen"))
    if "use_sliding_window" in config and isinstance(config.get("max_window_layers"), int):
        used = used and config["max_window_layers"] < layers
    if name == "sliding_window" and window is not None and used and cuts and not listed:
        expected = "none" if positions is None else f"none, or the {positions} positions or more"
        yield f"sliding_window: expected {expected}, as windows are not modelled, got {window!r}"


def shipped() -> list[str]:
    """Names of the models whose sizes come with effops."""
    return sorted(path.stem for path in SHIPPED.glob("*.json"))
