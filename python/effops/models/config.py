"""The configuration of a decoder, read from and written as a Hugging Face ``config.json``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from effops.models.errors import CheckpointError
from effops.models.moe_config import (
    MOE_DEFAULTS,
    ExpertsConfig,
    LatentConfig,
    experts_to_dict,
    read_experts,
    read_latent,
)
from effops.models.quantization_config import QuantizationConfig
from effops.nn.rotary import ROPE_TYPES

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "olmoe": "OlmoeForCausalLM",
    "deepseek_v2": "DeepseekV2ForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
}

_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)

# What a family's configuration means where the file is silent (the defaults of its Transformers class).
_FAMILY_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048, "eos_token_id": 2},
    "mistral": {
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
        "eos_token_id": 2,
    },
    "qwen2": {"max_position_embeddings": 32768, "num_key_value_heads": 32, "sliding_window": 4096},
    "qwen3": {
        "max_position_embeddings": 32768,
        "num_key_value_heads": 32,
        "sliding_window": 4096,
        "head_dim": 128,
    },
    **MOE_DEFAULTS,
}

# Which families have a switch of this name.
_ATTENTION_BIAS = ("llama", "qwen3", "qwen3_moe", "olmoe", "deepseek_v2", "deepseek_v3")
_MLP_BIAS = ("llama",)
_LAYER_TYPES = ("qwen2", "qwen3", "qwen2_moe")


@dataclass
class ModelConfig:
    """Sizes and switches of a decoder, under their usual names.

    ``attention_bias`` puts biases on q, k and v, ``attention_out_bias`` one on the output projection.
    ``windows`` has one entry a layer: a sliding window, or None for full attention. ``qk_norm`` normalises each query
    and key head, ``qk_norm_whole`` all heads at once; ``clip_qkv`` bounds queries, keys and values. ``experts`` None is
    a model without them; ``latent`` None is ordinary attention. With latent attention ``head_dim`` is a key's.
    ``quantization`` says how a checkpoint stores linear layers, None: as they are.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-6
    rope_parameters: dict[str, Any] = field(default_factory=lambda: {"rope_type": "default", "rope_theta": 10000.0})
    attention_bias: bool = False
    attention_out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tie_word_embeddings: bool = False
    windows: tuple[int | None, ...] = ()
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    dtype: str = "float32"
    qk_norm_whole: bool = False
    clip_qkv: float | None = None
    experts: ExpertsConfig | None = None
    latent: LatentConfig | None = None
    quantization: QuantizationConfig | None = None

    def __post_init__(self) -> None:
        self._complete("ModelConfig")

    @property
    def v_head_dim(self) -> int:
        """Features of a value head."""
        return self.latent.v_head_dim if self.latent else self.head_dim

    @property
    def rope_dim(self) -> int:
        """Features of a head among which the rotary embedding has its share."""
        return self.latent.qk_rope_head_dim if self.latent else self.head_dim

    @property
    def context_length(self) -> int:
        """Tokens that a sequence may have: dynamic and yarn scaling reach past the trained positions."""
        rope, longest = self.rope_parameters, self.max_position_embeddings
        if rope["rope_type"] == "dynamic":
            return int(longest * rope["factor"])
        if rope["rope_type"] == "yarn" and rope.get("factor"):
            return max(longest, int(rope.get("original_max_position_embeddings", longest) * rope["factor"]))
        return longest

    def is_extra(self, name: str) -> bool:
        """Whether a checkpoint's tensor belongs to a layer past the last: DeepSeek-V3's multi-token prediction."""
        parts = name.split(".")
        extra = self.model_type == "deepseek_v3" and parts[:2] == ["model", "layers"] and parts[2:3] != []
        return extra and parts[2].isdigit() and int(parts[2]) >= self.num_hidden_layers

    def _complete(self, source: str) -> None:
        for name in _SIZES:
            value = getattr(self, name)
            if not isinstance(value, int) or value <= 0:
                raise CheckpointError(source, name, f"expected a positive integer, got {value!r}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise CheckpointError(
                source,
                "num_attention_heads",
                f"expected a multiple of num_key_value_heads ({self.num_key_value_heads}), "
                f"got {self.num_attention_heads}",
            )
        self.windows = self.windows or (None,) * self.num_hidden_layers
        if len(self.windows) != self.num_hidden_layers:
            raise CheckpointError(
                source, "layer_types", f"expected {self.num_hidden_layers} entries, got {len(self.windows)}"
            )
        kind = self.rope_parameters.get("rope_type")
        if kind not in ROPE_TYPES:
            raise CheckpointError(source, "rope_type", f"expected one of {', '.join(ROPE_TYPES)}, got {kind!r}")
        for name in ROPE_TYPES[kind]:
            if self.rope_parameters.get(name) is None:
                raise CheckpointError(source, f"rope_parameters.{name}", f"expected for {kind}, got nothing")

    @classmethod
    def from_file(cls, path: str | Path) -> ModelConfig:
        """Reads a ``config.json``, or the one in a directory."""
        path = Path(path)
        path = path / "config.json" if path.is_dir() else path
        return cls.from_dict(read_json(path), source=str(path))

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], source: str = "config") -> ModelConfig:
        """Reads the fields of a Hugging Face configuration; errors name ``source`` and the field."""
        kind = raw.get("model_type")
        if kind not in ARCHITECTURES:
            raise CheckpointError(source, "model_type", f"expected one of {', '.join(ARCHITECTURES)}, got {kind!r}")
        # An explicit null means none, an absent field means the family's default.
        given = {k: v for k, v in {**_FAMILY_DEFAULTS[kind], **raw}.items() if v is not None}

        def fail(name: str, detail: str) -> CheckpointError:
            return CheckpointError(source, name, detail)

        if given.get("hidden_act", "silu") != "silu":
            raise CheckpointError(source, "hidden_act", f"expected 'silu', got {given['hidden_act']!r}")
        quantization = given.get("quantization_config")

        def size(name: str, default: int | None = None) -> Any:
            if name not in given and default is None:
                raise CheckpointError(source, name, "expected a positive integer, got nothing")
            return given.get(name, default)

        heads, hidden = size("num_attention_heads"), size("hidden_size")
        head_dim = size("head_dim", hidden // heads if isinstance(heads, int) and heads > 0 else 0)
        experts, latent = read_experts(kind, given, fail), read_latent(kind, given, raw, fail)
        if latent:
            if given.get("mlp_bias", False):
                raise fail("mlp_bias", "expected false, got true")
            head_dim = latent.qk_nope_head_dim + latent.qk_rope_head_dim
            if given.get("num_key_value_heads", heads) != heads:
                raise fail("num_key_value_heads", f"expected num_attention_heads ({heads}) in latent attention")
        bias = bool(given.get("attention_bias", False)) and kind in _ATTENTION_BIAS
        eos = given.get("eos_token_id", ())
        try:
            return cls(
                model_type=kind,
                vocab_size=size("vocab_size"),
                hidden_size=hidden,
                intermediate_size=size("intermediate_size"),
                num_hidden_layers=size("num_hidden_layers"),
                num_attention_heads=heads,
                num_key_value_heads=size("num_key_value_heads", heads),
                head_dim=head_dim,
                max_position_embeddings=size("max_position_embeddings"),
                rms_norm_eps=float(given.get("rms_norm_eps", 1e-6)),
                rope_parameters=_rope_parameters(given),
                quantization=None if quantization is None else QuantizationConfig.read(quantization, source),
                attention_bias=bias or kind == "qwen2" or (kind == "qwen2_moe" and bool(given.get("qkv_bias", True))),
                attention_out_bias=bias,
                mlp_bias=kind in _MLP_BIAS and bool(given.get("mlp_bias", False)),
                qk_norm=kind in ("qwen3", "qwen3_moe", "olmoe"),
                qk_norm_whole=kind == "olmoe",
                clip_qkv=float(given["clip_qkv"]) if kind == "olmoe" and "clip_qkv" in given else None,
                experts=experts,
                latent=latent,
                tie_word_embeddings=bool(given.get("tie_word_embeddings", False)),
                windows=_windows(kind, given, source),
                bos_token_id=given.get("bos_token_id"),
                eos_token_ids=tuple(eos) if isinstance(eos, list | tuple) else (eos,),
                dtype=str(given.get("dtype") or given.get("torch_dtype") or "float32").removeprefix("torch."),
            )
        except CheckpointError as error:
            raise CheckpointError(source, error.field, error.detail) from None

    def to_dict(self) -> dict[str, Any]:
        """The same as a Hugging Face configuration, rope and dtype in their new and their older spelling."""
        rope = dict(self.rope_parameters)
        scaling = {k: v for k, v in rope.items() if k != "rope_theta"}
        window = next((w for w in self.windows if w), None)
        raw: dict[str, Any] = {
            "architectures": [ARCHITECTURES[self.model_type]],
            "model_type": self.model_type,
            "hidden_act": "silu",
            "rope_parameters": rope,
            "rope_theta": rope["rope_theta"],
            "rope_scaling": None if scaling.get("rope_type") == "default" else scaling,
            "sliding_window": window,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": list(self.eos_token_ids) or None,
            "dtype": self.dtype,
            "torch_dtype": self.dtype,
        }
        for name in (*_SIZES, "rms_norm_eps", "tie_word_embeddings"):
            raw[name] = getattr(self, name)
        kind = self.model_type
        if kind in _ATTENTION_BIAS:
            raw["attention_bias"] = self.attention_bias
        if kind == "qwen2_moe":
            raw["qkv_bias"] = self.attention_bias
        if kind in _MLP_BIAS:
            raw["mlp_bias"] = self.mlp_bias
        if kind in _LAYER_TYPES:
            raw["layer_types"] = ["sliding_attention" if w else "full_attention" for w in self.windows]
        if kind in (*_LAYER_TYPES, "qwen3_moe"):
            raw["use_sliding_window"] = window is not None
        if kind == "olmoe":
            raw["clip_qkv"] = self.clip_qkv
        if self.experts:
            raw |= experts_to_dict(kind, self.experts, self.num_hidden_layers)
        if self.latent:
            raw |= {**asdict(self.latent), "head_dim": self.latent.qk_rope_head_dim}
            if kind == "deepseek_v2":
                del raw["rope_interleave"]
        return raw


def _rope_parameters(given: Mapping[str, Any]) -> dict[str, Any]:
    """``rope_parameters`` (Transformers 5), or ``rope_theta`` and ``rope_scaling`` (before)."""
    rope = dict(given.get("rope_scaling") or given.get("rope_parameters") or {})
    rope["rope_type"] = rope.pop("type", None) or rope.get("rope_type") or "default"
    rope.setdefault("rope_theta", given.get("rope_theta", 10000.0))
    if "partial_rotary_factor" in given:
        rope.setdefault("partial_rotary_factor", given["partial_rotary_factor"])
    if "original_max_position_embeddings" in given:
        rope["original_max_position_embeddings"] = given["original_max_position_embeddings"]
    return rope


def _windows(kind: str, given: Mapping[str, Any], source: str) -> tuple[int | None, ...]:
    """One window a layer: Mistral's holds for all, Qwen's for the layers that the configuration names."""
    layers, window = given["num_hidden_layers"], given.get("sliding_window")
    if kind in ("llama", "olmoe", "deepseek_v2", "deepseek_v3") or not isinstance(layers, int):
        return ()
    if kind in ("mistral", "mixtral"):
        return (window,) * layers
    window = window if given.get("use_sliding_window", False) else None
    if kind == "qwen3_moe":
        return (window,) * layers
    types = given.get("layer_types")
    if types is None and kind == "qwen2_moe":
        first = given.get("max_window_layers", 28)
        types = ["sliding_attention" if i % 2 == 0 and i < first else "full_attention" for i in range(layers)]
    elif types is None:
        first = given.get("max_window_layers", 28)
        types = ["sliding_attention" if i >= first else "full_attention" for i in range(layers)]
    unknown = set(types) - {"sliding_attention", "full_attention"}
    if unknown:
        raise CheckpointError(
            source, "layer_types", f"expected sliding_attention or full_attention, got {sorted(unknown)[0]!r}"
        )
    return tuple(window if t == "sliding_attention" else None for t in types)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; a missing or broken file is one clear line."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(str(path), "file", "expected to exist, got nothing") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(str(path), "file", f"expected readable JSON, got {error}") from None
    if not isinstance(raw, dict):
        raise CheckpointError(str(path), "file", f"expected a JSON object, got {type(raw).__name__}")
    return raw
