"""The Llama, Mistral, Qwen2 and Qwen3 decoder, assembled from effops modules."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ClassVar, TypeVar, cast

import torch
from torch import Tensor, nn

from effops import ops
from effops.cache import (
    DenseKVCache,
    HeavyHitterKVCache,
    KVCache,
    LabelledKVCache,
    LayerCache,
    MergedKVCache,
    OffloadedKVCache,
    PagedKVCache,
    PrefixTreeKVCache,
    QuestKVCache,
    Step,
    StreamingKVCache,
    TreeNodes,
)
from effops.models.checkpoint import TensorFiles, parse_dtype, save_tensors, write_json
from effops.models.config import ModelConfig
from effops.models.errors import CheckpointError
from effops.models.names import layer_tensors, row_orders
from effops.models.packed_checkpoint import packed_tensors, place_packed
from effops.models.quantized import place_quantized
from effops.models.weights import DecoderWeights
from effops.nn import (
    MLP,
    Attention,
    DecoderLayer,
    LatentAttention,
    Linear,
    MoE,
    RMSNorm,
    Rope,
    RotaryEmbedding,
)
from effops.nn.functional import has_fused_layers

Model = TypeVar("Model", bound="Llama")
Cache = TypeVar("Cache")


class Llama(nn.Module):
    """A causal language model: tokens int64 [B,T] to logits [B,T,V] in the model's dtype.

    The constructor allocates the weights without filling them; ``from_pretrained`` loads them and
    ``random`` draws them.
    """

    families: ClassVar[tuple[str, ...]] = ("llama", "mistral", "qwen2", "qwen3")

    def __init__(
        self,
        config: ModelConfig,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if config.model_type not in self.families:
            expected = ", ".join(self.families)
            raise ValueError(
                f"{type(self).__name__}: model_type: expected one of {expected}, got {config.model_type!r}"
            )
        self.config = config
        c = config

        def norm() -> RMSNorm:
            return RMSNorm(c.hidden_size, c.rms_norm_eps, dtype=dtype, device=device)

        place: Any = {"dtype": dtype, "device": device}

        def layer(i: int, window: int | None) -> DecoderLayer:
            return DecoderLayer(self._attention(window, **place), self._mlp(i, **place), norm(), norm())

        weight = torch.empty(c.vocab_size, c.hidden_size, dtype=dtype, device=device)
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size, _weight=weight)
        self.layers = nn.ModuleList(layer(i, window) for i, window in enumerate(c.windows))
        self.norm = norm()
        tied = c.tie_word_embeddings
        self.lm_head = Linear(c.hidden_size, c.vocab_size, dtype=dtype, device="meta" if tied else device)
        if tied:
            self.lm_head.weight = cast(nn.Parameter, self.embed_tokens.weight)
        self._whole = DecoderWeights(self)
        self.rotary = RotaryEmbedding(c.rope_dim, c.max_position_embeddings, c.rope_parameters)

    def _attention(self, window: int | None, **place: Any) -> Attention | LatentAttention:
        c = self.config
        return Attention(
            c.hidden_size,
            c.num_attention_heads,
            c.num_key_value_heads,
            c.head_dim,
            bias=c.attention_bias,
            out_bias=c.attention_out_bias,
            qk_norm_eps=c.rms_norm_eps if c.qk_norm else None,
            qk_norm_whole=c.qk_norm_whole,
            clip=c.clip_qkv,
            window=window,
            **place,
        )

    def _mlp(self, layer: int, **place: Any) -> MLP | MoE:
        return MLP(self.config.hidden_size, self.config.intermediate_size, bias=self.config.mlp_bias, **place)

    @property
    def dtype(self) -> torch.dtype:
        return self.embed_tokens.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.embed_tokens.weight.device

    def _new(self, kind: Callable[..., Cache], *sizes: int, **options: Any) -> Cache:
        """An empty cache that fits this model; sizes are those between the layers and the KV heads."""
        c = self.config
        return kind(
            c.num_hidden_layers, *sizes, c.num_key_value_heads, c.head_dim, v_head_dim=c.v_head_dim, dtype=self.dtype,
            device=self.device, **options,
        )  # fmt: skip

    def new_cache(self, batch_size: int, capacity: int) -> DenseKVCache:
        """An empty dense cache that fits this model."""
        return self._new(DenseKVCache, batch_size, capacity)

    def new_paged_cache(self, batch_size: int, num_pages: int, page_size: int = 16) -> PagedKVCache:
        """An empty cache of pages that fits this model; a sequence may have the model's context."""
        return self._new(PagedKVCache, batch_size, num_pages, page_size)

    def new_labelled_cache(self, batch_size: int, capacity: int, **options: Any) -> LabelledKVCache:
        """An empty cache whose decode steps attend to few tokens; ``options`` are those of
        :class:`effops.cache.LabelledKVCache`, ``channels`` what :func:`effops.cache.calibrate_channels` found."""
        return self._new(LabelledKVCache, batch_size, capacity, **options)

    def new_quest_cache(self, batch_size: int, capacity: int, **options: Any) -> QuestKVCache:
        """An empty cache whose decode steps attend to few pages; ``options`` are those of
        :class:`effops.cache.QuestKVCache`."""
        return self._new(QuestKVCache, batch_size, capacity, **options)

    def new_offloaded_cache(self, batch_size: int, capacity: int, **options: Any) -> OffloadedKVCache:
        """An empty labelled cache over a file in ``directory``; the other options are those of
        :meth:`new_labelled_cache`."""
        return self._new(OffloadedKVCache, batch_size, capacity, **options)

    def new_prefix_cache(
        self, batch_size: int, num_pages: int, page_size: int = 16, **options: Any
    ) -> PrefixTreeKVCache:
        """An empty cache of pages whose sequences share what they have in common; ``options`` are those of
        :class:`effops.cache.PrefixTreeKVCache`."""
        return self._new(PrefixTreeKVCache, batch_size, num_pages, page_size, **options)

    def new_streaming_cache(self, batch_size: int, capacity: int, **options: Any) -> StreamingKVCache:
        """An empty cache of sinks and recent tokens, and of all tokens for ``full_heads``; ``options`` are those of
        :class:`effops.cache.StreamingKVCache`."""
        return self._new(StreamingKVCache, batch_size, capacity, rotary=self.rotary, **options)

    def new_heavy_hitter_cache(self, batch_size: int, capacity: int, **options: Any) -> HeavyHitterKVCache:
        """An empty cache that keeps few entries of a sequence of up to ``capacity`` tokens; ``options`` are those of
        :class:`effops.cache.HeavyHitterKVCache`. ValueError where a layer's window is below the capacity."""
        self._require_windows("new_heavy_hitter_cache", capacity)
        return self._new(HeavyHitterKVCache, batch_size, capacity, **options)

    def new_merged_cache(self, batch_size: int, capacity: int, **options: Any) -> MergedKVCache:
        """An empty cache that compresses a prompt once, for sequences of up to ``capacity`` tokens; ``options`` are
        those of :class:`effops.cache.MergedKVCache`. ValueError where a layer's window is below the capacity."""
        self._require_windows("new_merged_cache", capacity)
        return self._new(MergedKVCache, batch_size, capacity, **options)

    def _require_windows(self, method: str, capacity: int) -> None:
        windows = [window for window in self.config.windows if window and window < capacity]
        if windows:
            least = f"at most the layers' window of {min(windows)}"
            raise ValueError(f"{method}: capacity: expected {least}, got {capacity}")

    def forward(
        self,
        tokens: Tensor,
        cache: KVCache | None = None,
        *,
        lengths: Sequence[int] | None = None,
        tree: TreeNodes | None = None,
        logits_to_keep: int | None = None,
    ) -> Tensor:
        """Logits [B,T,V] of tokens int64 [B,T], or of the last ``logits_to_keep`` positions only.

        Without a cache the tokens are whole sequences, and gradients flow. With a cache they continue what it
        holds, and no gradient is recorded; ``lengths[b]`` says how many of row b's tokens are real where rows
        are padded on the left. ``tree`` says that the tokens are trees rather than consecutive; ``cache.commit`` then
        keeps the accepted ones.
        """
        if cache is None:
            for name, given in (("lengths", lengths), ("tree", tree)):
                if given is not None:
                    raise ValueError(f"Llama: {name}: expected a cache beside it, got None")
        elif logits_to_keep is None or logits_to_keep >= tokens.shape[1]:
            return self.step(tokens, cache, lengths=lengths, tree=tree)[1]
        own: Any = self._modules
        x = self.hidden_states(tokens, cache, lengths=lengths, tree=tree, keep=logits_to_keep, normed=False)
        if cache is not None and torch.is_grad_enabled():
            with torch.no_grad():
                return own["lm_head"].forward(x, None, own["norm"])
        return own["lm_head"].forward(x, None, own["norm"])

    def hidden_states(
        self,
        tokens: Tensor,
        cache: KVCache | None = None,
        *,
        lengths: Sequence[int] | None = None,
        tree: TreeNodes | None = None,
        keep: int | None = None,
        normed: bool = True,
    ) -> Tensor:
        """The last layer's output [B,T,d] (of the last ``keep`` tokens only), after the final norm if ``normed``; what
        :meth:`logits` and draft heads read. The other arguments are those of the call."""
        if cache is not None and torch.is_grad_enabled():
            with torch.no_grad():
                return self.hidden_states(tokens, cache, lengths=lengths, tree=tree, keep=keep, normed=normed)
        own: Any = self._modules
        batch, count = tokens.shape
        x = torch.embedding(own["embed_tokens"]._parameters["weight"], tokens)
        step: Step | None = None
        layer_caches: Sequence[LayerCache | None] = [None] * len(self.layers)
        if cache is None:
            positions = torch.arange(count, dtype=torch.int32, device=tokens.device).expand(batch, -1)
            rope = Rope(*self.rotary.tables(count, x.device), positions)
        else:
            step, layer_caches = cache.plan(count, lengths, tree), cache.layers
            rope = Rope(*self.rotary.tables(step.span, x.device), step.positions)
        *first, last = zip(own["layers"]._modules.values(), layer_caches, strict=True)
        for layer, kv in first:
            x = layer.forward(x, rope, kv, step)
        x = last[0].forward(x, rope, last[1], step, keep)
        if cache is not None and step is not None:
            cache.advance(step)
        return own["norm"].forward(x) if normed else x

    def step(
        self, tokens: Tensor, cache: KVCache, *, lengths: Sequence[int] | None = None, tree: TreeNodes | None = None
    ) -> tuple[Tensor, Tensor]:
        """:meth:`hidden_states` and :meth:`logits` of all tokens, in one op where every part of the model is plain."""
        if torch.is_grad_enabled():
            with torch.no_grad():
                return self.step(tokens, cache, lengths=lengths, tree=tree)
        weights = None
        plain = self.config.experts is None and self.config.latent is None
        if plain and (type(cache) is DenseKVCache or type(cache) is PagedKVCache) and has_fused_layers(tokens):
            weights = self._whole.get()
        if weights is None or weights[0].dtype is torch.float64:
            hidden = self.hidden_states(tokens, cache, lengths=lengths, tree=tree)
            return hidden, self.logits(hidden)
        assert isinstance(cache, DenseKVCache | PagedKVCache)
        plan = cache.plan(tokens.shape[1], lengths, tree)
        arguments: Any = (
            *weights, *self.rotary.tables(plan.span, tokens.device), plan.positions, cache.k, cache.v, plan.slots,
            plan.kv_lens, self._whole.windows, self._whole.norm_eps, plan.max_kv_len,
        )  # fmt: skip
        if plan.tree is None:
            result = ops.decoder(tokens, *arguments, page_table=plan.page_table)
        else:
            nodes = plan.tree
            result = ops.decoder(
                tokens, *arguments, page_table=plan.page_table, ancestors=nodes.ancestors, depths=nodes.depths
            )
        cache.advance(plan)
        return result

    def pinned(self) -> AbstractContextManager[None]:
        """A context in which no module or parameter is replaced, so that steps look them up once. Writing into
        parameters is allowed."""
        return self._whole.pinned()

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [...,V] of normed hidden states [...,d]."""
        head: Any = self._modules["lm_head"]
        return cast(Tensor, head.forward(hidden))

    def checkpoint_tensors(self, stored: Collection[str] = ()) -> dict[str, Tensor]:
        """Every weight under its Hugging Face name; fused weights appear as views of their parts. ``stored`` are the
        names of a checkpoint, where more than one naming is known."""
        named: dict[str, Tensor] = {"model.embed_tokens.weight": self.embed_tokens.weight}
        for i, layer in enumerate(cast(Iterable[DecoderLayer], self.layers)):
            named |= layer_tensors(layer, self.config, f"model.layers.{i}.", stored)
        named["model.norm.weight"] = self.norm.weight
        if not self.config.tie_word_embeddings:
            named |= {f"lm_head.{kind}": weight for kind, weight in self.lm_head.named_parameters()}
        return named

    @classmethod
    def from_pretrained(
        cls: type[Model],
        directory: str | Path,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Model:
        """Loads ``config.json`` and the safetensors of a directory; dtype None takes the configuration's. Layers that
        GPTQ or AWQ quantised become :class:`effops.nn.PackedLinear`, bit for bit what is stored; so do those of
        ``save_pretrained``, and experts their panels."""
        config = ModelConfig.from_file(Path(directory))
        if config.model_type not in cls.families:
            raise CheckpointError(
                str(Path(directory) / "config.json"),
                "model_type",
                f"expected one of {', '.join(cls.families)} for {cls.__name__}, got {config.model_type!r}",
            )
        files = TensorFiles(directory)
        dtype = dtype or parse_dtype(config.dtype, str(Path(directory) / "config.json"))
        model = cls(config, dtype=dtype, device=device)
        quantized: set[str] = set()
        if config.quantization is not None and config.quantization.method == "effops":
            quantized = place_packed(model, files, dict(config.quantization.activations))
        elif config.quantization is not None:
            quantized = place_quantized(model, files, config.quantization)
        named, orders = model.checkpoint_tensors(files.names()), row_orders(config)
        ignored = quantized | {name for name in files.names() if name.endswith("rotary_emb.inv_freq")}
        ignored |= {name for name in files.names() if config.is_extra(name)}
        if config.tie_word_embeddings:
            ignored.add("lm_head.weight")
        with torch.no_grad():
            for name, target in named.items():
                files.copy_into(name, target, orders.get(name))
        unknown = sorted(files.names() - named.keys() - ignored)
        if unknown:
            raise CheckpointError(
                str(files.source), unknown[0], f"expected no such tensor in a {config.model_type} model"
            )
        return model.eval()

    def save_pretrained(self, directory: str | Path, *, max_shard_bytes: int = 4 << 30) -> None:
        """Writes ``config.json`` and safetensors that Transformers and this class load; this class alone, where layers
        are quantised.

        Each file is written under a temporary name and moved, the configuration last.
        """
        packed, quantization = packed_tensors(self)
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        orders = row_orders(self.config)
        named = self.checkpoint_tensors()
        tensors = {n: t.detach()[orders[n].to(t.device)] if n in orders else t for n, t in named.items()}
        save_tensors(directory, tensors | packed, max_shard_bytes)
        raw = self.config.to_dict()
        if quantization is not None:
            raw["quantization_config"] = quantization
        raw["dtype"] = raw["torch_dtype"] = str(self.dtype).removeprefix("torch.")
        write_json(directory / "config.json", raw)

    @classmethod
    def random(
        cls: type[Model],
        config: ModelConfig,
        *,
        seed: int = 0,
        std: float = 0.02,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> Model:
        """A model with normal weights of the given deviation, zero biases and unit norms."""
        model = cls(config, dtype=dtype, device=device)
        generator = torch.Generator(model.device).manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):
                    parameter.zero_()
                elif "norm" in name:
                    parameter.fill_(1.0)
                else:
                    parameter.normal_(0.0, std, generator=generator)
        return model.eval()
