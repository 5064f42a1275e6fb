"""A model's matrices in the banks of a device, its products computed as the device does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effops import ops
from effops.nn import functional
from effops.nn.basic import LINEARS, RMSNorm
from effops.nn.moe import MoE
from effops.pim.costs import Costs
from effops.pim.device import Device
from effops.pim.layout import BankLayout

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu2": lambda x: F.relu(x).square(),
}
M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class Offloaded:
    """A layer whose matrices lie in banks, and with how many vectors the units have them."""

    name: str
    shape: tuple[int, ...]
    rows: int


class PimLinear(nn.Module):
    """:class:`effops.nn.Linear` whose weight lies in a device's banks, in 16 bits.

    Up to ``rows`` vectors the units multiply, in their order and precision; the processor adds the results of the rows
    of a bank, the bias and the residual in float32. More vectors are the processor's, an ordinary product with the
    same 16-bit weight. No gradient reaches the weight.
    """

    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None, layout: BankLayout, rows: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.layout, self.rows = layout, rows
        self.out_features, self.in_features = weight.shape
        self.register_buffer("banks", layout.pack(weight.detach().to(dtype))[None])
        self.register_buffer("bias", None if bias is None else bias.detach())

    def _apply(self, fn: Any, recurse: bool = True) -> PimLinear:
        return _keeping_dtype(self, ("banks",), lambda: super(PimLinear, self)._apply(fn, recurse))

    def forward(
        self, x: Tensor, residual: Tensor | None = None, norm: RMSNorm | None = None, gated: bool = False
    ) -> Tensor:
        if norm is not None:
            x = norm.forward(x)
        if gated:
            x = functional.silu_mul(x)
        y = self.product(x.reshape(1, -1, self.in_features)).view(*x.shape[:-1], self.out_features)
        if self.bias is not None:
            y = y + self.bias
        y = y.to(x.dtype)
        return y if residual is None else y + residual

    def product(self, x: Tensor) -> Tensor:
        """x ``[1, M, K]`` times the weight, float32 ``[1, M, N]``."""
        banks: Any = self.banks
        narrow = x.to(banks.dtype)
        if x.shape[1] <= self.rows:
            return self.layout.matvec(narrow, banks, self.out_features)
        weight = self.layout.unpack(banks[0], self.out_features, self.in_features)
        return F.linear(narrow.float(), weight.float())

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, rows={self.rows}"


class PimExperts(nn.Module):
    """Experts of :class:`effops.nn.MoE` in banks: those with few tokens are the units', the others the processor's,
    divided so that the slower side is soonest done (Duplex, section V-B); what both give is added once."""

    def __init__(self, moe: MoE, layout: BankLayout, costs: Costs, dtype: torch.dtype) -> None:
        super().__init__()
        up, down = moe.w_gate_up, moe.w_down
        assert up is not None and down is not None
        self.layout, self.costs = layout, costs
        self.interleaved = moe.interleaved
        self.gated = up.shape[1] == 2 * down.shape[2]
        self.sizes = [(int(w.shape[1]), int(w.shape[2])) for w in (up, down)]
        with torch.no_grad():  # both sides compute with the values in the banks
            for w in (up, down):
                w.copy_(w.to(dtype))
        self.weights, self.biases = (up, down), (moe.bias_gate_up, moe.bias_down)
        self.register_buffer("up", layout.pack(up.detach().to(dtype)))
        self.register_buffer("down", layout.pack(down.detach().to(dtype)))
        self.near: list[bool] = []  # of the last call

    def _apply(self, fn: Any, recurse: bool = True) -> PimExperts:
        return _keeping_dtype(self, ("up", "down"), lambda: super(PimExperts, self)._apply(fn, recurse))

    def run(self, rows: Tensor, weights: Tensor, ids: Tensor, activation: str) -> Tensor:
        tokens = torch.bincount(ids[ids >= 0].flatten().long(), minlength=len(self.weights[0])).tolist()
        self.near = self.costs.split_experts(tokens, self.sizes)
        near = torch.tensor(self.near, device=ids.device)
        mine = (ids >= 0) & near[ids.clamp(min=0).long()]
        up, down = self.weights
        out = ops.fused_experts(
            rows, up, down, weights, torch.where(mine, -1, ids).int(), activation=activation,
            interleaved=self.interleaved, bias_gate_up=self.biases[0], bias_down=self.biases[1],
        ).float()  # fmt: skip
        for e, (n, is_near) in enumerate(zip(tokens, self.near, strict=True)):
            if n and is_near:
                token, place = (ids == e).nonzero(as_tuple=True)
                out.index_add_(0, token, self._expert(e, rows[token], activation) * weights[token, place, None])
        return out.to(rows.dtype)

    def _expert(self, e: int, x: Tensor, activation: str) -> Tensor:
        """float32 ``[n, d]`` of one expert at the banks."""
        own: Any = self._buffers
        narrow = own["up"].dtype
        hidden = self.layout.matvec(x.to(narrow)[None], own["up"][e : e + 1], self.sizes[0][0])[0]
        if self.biases[0] is not None:
            hidden = hidden + self.biases[0][e]
        act = ACTIVATIONS[activation]
        if self.gated:
            gate, value = (hidden[:, 0::2], hidden[:, 1::2]) if self.interleaved else hidden.chunk(2, -1)
            hidden = act(gate) * value
        else:
            hidden = act(hidden)
        out = self.layout.matvec(hidden.to(narrow)[None], own["down"][e : e + 1], self.sizes[1][0])[0]
        return out if self.biases[1] is None else out + self.biases[1][e]


T = TypeVar("T", bound=nn.Module)


def _keeping_dtype(module: T, names: Sequence[str], move: Callable[[], Any]) -> T:
    """A move of a module that leaves the dtype of what lies in banks."""
    dtypes = [getattr(module, name).dtype for name in names]
    kept = [getattr(module, name) for name in names]
    move()
    for name, tensor, dtype in zip(names, kept, dtypes, strict=True):
        moved = getattr(module, name)
        if moved.dtype != dtype:
            module._buffers[name] = tensor.to(moved.device)
    return module


def offload(
    module: M,
    device: Device | str,
    *,
    linears: bool = True,
    experts: bool = True,
    rows: int | None = None,
    skip: Sequence[str] = (),
    dtype: torch.dtype = torch.float16,
) -> M:
    """Moves a model's matrices into the banks of a device, in place: linear layers, torch's or this package's, become
    :class:`PimLinear`, experts of :class:`effops.nn.MoE` are shared by units and processor. Attention over keys and
    values in banks is :class:`effops.pim.BankedKVCache`'s.

    Args:
        module: the model; returned. ``module.offloaded`` lists what was moved.
        device: a device with processing in memory.
        linears, experts: what to move.
        rows: the most vectors that units take of a linear layer; None: as many as they are not slower with.
        skip: patterns of names of layers that stay as they are.
        dtype: of values in banks, float16 or bfloat16.

    Raises:
        ValueError: a device without processing in memory, another dtype, experts in panels or with an activation that
            the emulation has not.
    """
    device = device if isinstance(device, Device) else Device.load(device)
    if dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(f"offload: dtype: expected float16 or bfloat16, got {dtype}")
    if type(module) in LINEARS:
        raise ValueError(f"offload: module: expected a model that holds layers, got a {type(module).__name__}")
    layout, costs = BankLayout.of(device), Costs(device)
    moved: list[Offloaded] = []
    made: dict[nn.Module, PimLinear] = {}
    for name, parent in list(module.named_modules()):
        if experts and isinstance(parent, MoE) and not _skipped(name, skip):
            moved += _offload_experts(parent, name, layout, costs, dtype)
        if not linears:
            continue
        for child, layer in list(parent.named_children()):
            full = f"{name}.{child}".lstrip(".")
            if type(layer) not in LINEARS or _skipped(full, skip):
                continue
            if layer not in made:
                own: Any = layer
                out, inputs = own.weight.shape
                most = costs.crossover(out, inputs) if rows is None else rows
                made[layer] = PimLinear(own.weight, own.bias, layout, most, dtype)
                moved.append(Offloaded(full, (out, inputs), most))
            setattr(parent, child, made[layer])
    module.offloaded = moved  # type: ignore[assignment]
    return module


def _skipped(name: str, skip: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in skip)


def _offload_experts(moe: MoE, name: str, layout: BankLayout, costs: Costs, dtype: torch.dtype) -> list[Offloaded]:
    if moe.w_gate_up is None or moe.w_down is None:
        raise ValueError(f"offload: {name}: expected experts as parameters, got panels")
    if moe.activation not in ACTIVATIONS:
        raise ValueError(f"offload: {name}: expected {', '.join(ACTIVATIONS)}, got activation {moe.activation!r}")
    found = PimExperts(moe, layout, costs, dtype)
    moe.register_module("panels", found)
    most = costs.crossover(*found.sizes[0])
    return [Offloaded(f"{name}.{w}".lstrip("."), tuple(getattr(moe, w).shape), most) for w in MoE.WEIGHTS]
