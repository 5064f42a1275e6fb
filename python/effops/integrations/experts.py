"""``experts_implementation="effops"`` for Transformers models with mixtures of experts.

Transformers calls :func:`experts_forward` in place of the forward of an experts module: 3D weights ``gate_up_proj``
(or ``up_proj``) and ``down_proj``, whose layout and gating the module's flags and methods describe.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effops import ops
from effops.nn.panels import Panels

# The op's activations, of gate and up value; those of the value alone are those with an up value of 1.
_GATES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "silu": lambda gate, up: F.silu(gate) * up,
    "gelu": lambda gate, up: F.gelu(gate) * up,
    "gelu_tanh": lambda gate, up: F.gelu(gate, approximate="tanh") * up,
    "relu2": lambda gate, up: F.relu(gate).square() * up,
    "swiglu_oai": lambda gate, up: _clamped(gate) * (up.clamp(-7, 7) + 1),
}
_KNOWN = "_effops_gate"  # where a module keeps what was recognised


def experts_forward(
    module: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, **_: object
) -> Tensor:
    """The experts' output [N,d] for hidden_states [N,d], experts top_k_index [N,K] with weights top_k_weights [N,K].

    Computed in the weights' dtype, under autocast in autocast's, and returned in that of ``hidden_states``, with
    gradients for all but the indices. Under expert parallelism indices from ``num_experts`` on are other processes'
    and contribute nothing.

    Raises:
        ValueError: a norm after the experts, or a gating that ``ops.fused_experts`` does not have.
    """
    m: Any = module
    if m.has_post_expert_norm:
        raise ValueError(
            f"effops: {type(m).__name__}: expected experts without a norm after them, got post_expert_norm"
        )
    activation, interleaved = _gate_of(m)
    ids = top_k_index
    if m._is_expert_parallel:
        ids = ids.masked_fill(ids >= m.num_experts, -1)
    panels: Panels | None = getattr(m, "panels", None)
    if panels is not None:
        return panels.run(hidden_states, top_k_weights.float(), ids.to(torch.int32), activation)
    (w_first, w_second), (b_first, b_second) = _layer(m)
    device = hidden_states.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else w_first.dtype
    x, w_first, w_second = (t.to(dtype) for t in (hidden_states, w_first, w_second))
    b_first, b_second = (b if b is None else b.to(dtype) for b in (b_first, b_second))
    weights = top_k_weights.to(torch.float64 if x.dtype is torch.float64 else torch.float32)
    out = ops.fused_experts(
        x, w_first, w_second, weights, ids.to(torch.int32), activation=activation, interleaved=interleaved,
        bias_gate_up=b_first, bias_down=b_second,
    )  # fmt: skip
    return out.to(hidden_states.dtype)


def pack_experts_(model: nn.Module, format: str | None = None, **groups: Any) -> int:
    """Moves the experts' weights of a model with ``experts_implementation="effops"`` into panels, layer by layer: the
    fastest form for inference on CPU. The parameters are gone; the model is neither trained nor saved or moved any
    more.

    Args:
        format: "f32", "bf16", "f16", "int8", "int4" or "fp8_e4m3"; None keeps the dtype.
        groups: ``group_size``, ``symmetric``: as in ``ops.pack_experts``.

    Returns:
        How many layers there were.

    Raises:
        ValueError: the model computes its experts otherwise or has none, or weights that are not plain on the CPU.
    """
    config: Any = getattr(model, "config", None)
    chosen = getattr(config, "_experts_implementation", None)
    found = [m for m in model.modules() if hasattr(m, "has_gate") and hasattr(m, "is_transposed")]
    if not found or chosen != "effops":
        raise ValueError(
            f"effops: pack_experts_: expected a model with experts_implementation effops, got {type(model).__name__} "
            f"with {chosen if found else 'no experts'}"
        )
    for m in found:
        weights, biases = _layer(m)
        if any(w.device.type != "cpu" for w in weights):
            raise ValueError(f"effops: pack_experts_: {type(m).__name__}: expected weights on the CPU")
        Panels.pack(weights, biases, format, _gate_of(m)[1], **groups).replace(m, _names(m), saved=False)
    return len(found)


def _names(m: Any) -> tuple[str, str]:
    return ("gate_up_proj" if m.has_gate else "up_proj"), "down_proj"


def _layer(m: Any) -> tuple[tuple[Tensor, Tensor], tuple[Tensor | None, Tensor | None]]:
    """Weights [E,out,in] and biases."""
    first, second = (_weight(m, name) for name in _names(m))
    biases = tuple(getattr(m, f"{name}_bias") if m.has_bias else None for name in _names(m))
    return (first.mT, second.mT) if m.is_transposed else (first, second), (biases[0], biases[1])


def _weight(module: nn.Module, name: str) -> Tensor:
    weight = getattr(module, name)
    if not isinstance(weight, Tensor) or not weight.is_floating_point() or weight.dim() != 3:
        got = weight.dtype if isinstance(weight, Tensor) else type(weight).__name__
        raise ValueError(f"effops: {type(module).__name__}.{name}: expected a floating tensor [E,·,·], got {got}")
    return weight


@torch.compiler.assume_constant_result
def _gate_of(module: nn.Module) -> tuple[str, bool]:
    """Which of the op's activations a module has, and whether gate and up features alternate. Found by trying its
    function on numbers on which they all differ, because modules bring their own."""
    known: tuple[str, bool] | None = module.__dict__.get(_KNOWN)
    if known is None:
        known = module.__dict__[_KNOWN] = _recognise(module)
    return known


@torch.no_grad()
def _recognise(module: Any) -> tuple[str, bool]:
    values = torch.linspace(-12, 12, 49, dtype=torch.float64)
    pairs = torch.cartesian_prod(values, values)
    if module.has_gate:
        sample = torch.cat([pairs, pairs.roll(1, 0)], -1)  # four columns: halves and neighbours are different pairs
        got = module._apply_gate(sample)
    else:
        sample = values
        got = module.act_fn(sample)
    for name, interleaved, expected in _candidates(sample, module.has_gate):
        if got.shape == expected.shape and torch.allclose(got, expected, rtol=1e-5, atol=1e-6):
            return name, interleaved
    function = type(module)._apply_gate.__qualname__ if module.has_gate else "act_fn"
    raise ValueError(
        f"effops: {type(module).__name__}: expected a gating of {', '.join(_GATES)}, got another one "
        f"({function}, act_fn {getattr(module, 'act_fn', None)})"
    )


def _candidates(sample: Tensor, gated: bool) -> Iterator[tuple[str, bool, Tensor]]:
    """Activation, whether features alternate, and what the op makes of the sample."""
    for name, gate in _GATES.items():
        if gated:
            yield name, False, gate(*sample.chunk(2, -1))
            yield name, True, gate(sample[..., ::2], sample[..., 1::2])
        elif name != "swiglu_oai":
            yield name, False, gate(sample, torch.ones_like(sample))


def _clamped(gate: Tensor) -> Tensor:
    gate = gate.clamp(max=7)
    return gate * torch.sigmoid(1.702 * gate)
