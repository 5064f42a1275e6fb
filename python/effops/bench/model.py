"""Whole models of the Transformers library, with each implementation of their experts."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from effops.bench.work import Call, Other, Work
from effops.integrations.experts import experts_forward, pack_experts_

OWN = ("effops", "effops-plain", "effops-int8")
PEERS = ("eager", "grouped_mm", "batched_mm")
TOKENS = (1, 8, 128)
PAST = 64  # tokens in the cache before the timed ones
PROMPTS = 4  # that calls rotate over: few tokens meet other experts each time
GATHERED_BYTES = 4 << 30  # up to which batched_mm, which copies the weights of every choice, is run


# The published sizes, with so few layers that float32, too, fits into 24 GiB; the vocabulary shrinks as the layers do.
MODELS: dict[str, dict[str, Any]] = {
    "mixtral": {  # Mixtral-8x7B: 32 layers, 32,000 tokens
        "vocab_size": 1000, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 1,
        "num_attention_heads": 32, "num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2,
    },
    "qwen3_moe": {  # Qwen3-30B-A3B: 48 layers, 151,936 tokens
        "vocab_size": 6331, "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 2,
        "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128,
        "num_experts_per_tok": 8, "moe_intermediate_size": 768, "norm_topk_prob": True,
    },
    "olmoe": {  # OLMoE-1B-7B: 16 layers, 50,304 tokens
        "vocab_size": 6288, "hidden_size": 2048, "intermediate_size": 1024, "num_hidden_layers": 2,
        "num_attention_heads": 16, "num_key_value_heads": 16, "num_experts": 64, "num_experts_per_tok": 8,
    },
    "gpt_oss": {  # gpt-oss-20b: 24 layers, 201,088 tokens
        "vocab_size": 16757, "hidden_size": 2880, "intermediate_size": 2880, "num_hidden_layers": 2,
        "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64, "num_local_experts": 32,
        "num_experts_per_tok": 4, "sliding_window": 128,
    },
}  # fmt: skip
TINY = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "num_experts": 6, "num_local_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One forward pass of `tokens` tokens after PAST others."""

    dtype: str = "bfloat16"
    model: str = "olmoe"
    tokens: int = 1
    tiny: bool = False

    @property
    def name(self) -> str:
        size = "tiny, " if self.tiny else f"{MODELS[self.model]['num_hidden_layers']} of its layers, "
        return f"{self.model}, {size}{self.tokens} token{'s' * (self.tokens > 1)} {self.dtype}"


def default_cases(dtypes: tuple[str, ...]) -> Iterator[Case]:
    for dtype in dtypes:
        for model in MODELS:
            for tokens in TOKENS:
                yield Case(dtype, model, tokens)


def quick_cases(dtypes: tuple[str, ...]) -> Iterator[Case]:
    for dtype in dtypes:
        for model in MODELS:
            yield Case(dtype, model, 3, tiny=True)


@dataclass(frozen=True)
class Models:
    """A model with its experts as they are stored, in panels, and in panels of int8; the other weights are shared."""

    plain: Any
    panels: Any
    int8: Any
    exact: dict[int, Tensor]  # the logits of the first prompt of so many tokens, by eager in the next wider type


def inputs(model: Any, tokens: int) -> tuple[Tensor, list[Tensor]]:
    """What the cache holds, and the prompts."""
    vocabulary, generator = model.config.vocab_size, torch.Generator().manual_seed(1)
    past = torch.randint(1, vocabulary, (1, PAST), generator=generator)
    return past, [torch.randint(1, vocabulary, (1, tokens), generator=generator) for _ in range(PROMPTS)]


_held: dict[tuple[Any, ...], Models] = {}  # one: the cases of a model come one after another


def models_of(*key: Any) -> Models:
    """What ``_built`` makes of the same arguments, of which the last is kept."""
    if key not in _held:
        _held.clear()  # first: there is no room for two
        _held[key] = _built(*key)
    return _held[key]


def _built(name: str, tiny: bool, dtype: torch.dtype, tokens: tuple[int, ...]) -> Models:
    """A random one. Its attention is Transformers' own everywhere."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    from effops.integrations import transformers as integration

    integration.register()
    ALL_EXPERTS_FUNCTIONS.register("counting", _counting)
    config = AutoConfig.for_model(name, **MODELS[name] | (TINY if tiny else {}), pad_token_id=0)
    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_config(
        config,
        dtype=dtype,
        attn_implementation="eager" if name == "gpt_oss" else "sdpa",  # it has no other
        experts_implementation="effops",
    ).eval()
    wider = torch.float32 if dtype != torch.float32 else torch.float64
    wide = copy.deepcopy(plain, {id(p): nn.Parameter(p.to(wider)) for p in plain.parameters()})
    exact = {}
    for n in tokens:
        past, prompts = inputs(plain, n)
        exact[n] = _Pass(wide, "eager", past, prompts)(0)
    del wide  # there is no room for it beside the others
    packed = []
    for format in (None, "int8"):
        other = copy.deepcopy(plain, {id(p): p for p in plain.parameters()})
        pack_experts_(other, format)
        packed.append(other)
    return Models(plain, packed[0], packed[1], exact)


class _Pass:
    """The logits that follow some tokens; the cache is put back for the next call."""

    def __init__(self, model: Any, implementation: str, past: Tensor, prompts: list[Tensor]) -> None:
        self.model, self.implementation, self.prompts = model, implementation, prompts
        # batched_mm copies the weights of every choice: too many for the past.
        with _Implementation(model, "eager" if implementation == "batched_mm" else implementation), torch.no_grad():
            self.cache = model(past, use_cache=True).past_key_values
        # Without it a window that has been passed cannot be cropped; older versions of the library had no need.
        getattr(self.cache, "activate_past_recording", lambda: None)()

    def _chosen(self) -> Any:
        return _Implementation(self.model, self.implementation)

    def __call__(self, i: int) -> Tensor:
        prompt = self.prompts[i]
        with self._chosen(), torch.no_grad():
            logits: Tensor = self.model(prompt, past_key_values=self.cache, use_cache=True, logits_to_keep=1).logits
        self.cache.crop(-prompt.shape[1])
        return logits[:, -1]


class _Implementation:
    """While entered, the model computes its experts so."""

    def __init__(self, model: Any, name: str) -> None:
        self.config, self.name = model.config, name

    def __enter__(self) -> None:
        self.before = self.config._experts_implementation
        self.config._experts_implementation = self.name

    def __exit__(self, *_: object) -> None:
        self.config._experts_implementation = self.before


def work(case: Case, peers: tuple[str, ...]) -> Work:
    """A pass, several prompts of as many tokens, and every way to compute the experts."""
    dtype = getattr(torch, case.dtype)
    tokens = TOKENS if case.tokens in TOKENS and not case.tiny else (case.tokens,)
    models = models_of(case.model, case.tiny, dtype, tokens)
    past, prompts = inputs(models.plain, case.tokens)

    def of(model: Any, implementation: str = "effops") -> Call:
        return _Pass(model, implementation, past, prompts)

    calls: dict[str, Callable[[], Call | str]] = {
        "effops": lambda: of(models.panels),
        "effops-plain": lambda: of(models.plain),
        "effops-int8": lambda: of(models.int8),
        "eager": lambda: of(models.plain, "eager"),
        "grouped_mm": lambda: of(models.plain, "grouped_mm"),
        "batched_mm": lambda: of(models.plain, "batched_mm") if copied <= GATHERED_BYTES else "copies too much",
    }
    experts = [m for m in models.plain.modules() if hasattr(m, "has_gate") and hasattr(m, "is_transposed")]
    names = {id(p) for m in experts for p in m.parameters()}
    embedding = models.plain.get_input_embeddings().weight
    others = [p for p in models.plain.parameters() if id(p) not in names and p is not embedding]
    each = sum(p.numel() for p in experts[0].parameters()) // len(experts[0].down_proj)
    active = _active(of(models.plain, "counting"), len(prompts))
    k = models.plain.config.num_experts_per_tok
    copied = case.tokens * k * each * dtype.itemsize
    flops = 2 * case.tokens * (sum(p.numel() for p in others) + each * k * len(experts))
    rest = sum(p.nbytes for p in others)
    return Work(
        name=case.name,
        fields={**asdict(case), "active_experts": active, "layers": len(experts)},
        dtype=dtype,
        bytes=rest + round(active * each * dtype.itemsize),
        flops=flops,
        copies=PROMPTS,
        candidates={name: calls[name]() for name in (*OWN, *peers)},
        check=_checker(models.plain, models.exact[case.tokens], past, prompts[0]),
        others={"effops-int8": Other("the model with int8 experts", rest + round(active * each), flops)},
    )


_chosen: list[int] = []  # how many experts each call of _counting chose


def _counting(module: nn.Module, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    _chosen.append(len(ids.unique()))
    return experts_forward(module, x, ids, weights)


def _active(run: Call, prompts: int) -> float:
    """Mean number of experts that a pass chooses, summed over the layers."""
    _chosen.clear()
    for i in range(prompts):
        run(i)
    return sum(_chosen) / prompts


def _checker(model: nn.Module, right: Tensor, past: Tensor, prompt: Tensor) -> Callable[[str, Tensor], float]:
    """Root of the mean squared error against the same weights in the next wider type, in units of 4 times that of
    ``eager``: where rounding makes a tie, single choices of a router differ, so that no bound by roundings holds. Of
    int8 in units of a tenth of the logits' own."""

    @cache
    def usual() -> float:
        return _distance(_Pass(model, "eager", past, [prompt])(0), right)

    def check(name: str, logits: Tensor) -> float:
        if logits.shape != right.shape:
            return torch.inf
        allowed = 0.1 * _distance(right, torch.zeros(())) if name == "effops-int8" else 4 * usual()
        return _distance(logits, right) / allowed

    return check


def _distance(logits: Tensor, right: Tensor) -> float:
    return float((logits.double() - right.double()).square().mean().sqrt())
