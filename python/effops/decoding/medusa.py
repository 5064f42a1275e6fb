"""Medusa heads: several tokens beyond the next one, guessed from one hidden state of a frozen model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effops.models.checkpoint import TensorFiles, parse_dtype, save_tensors, write_json
from effops.models.config import read_json
from effops.models.errors import CheckpointError

MODEL_TYPE = "medusa"


class MedusaHeads(nn.Module):
    """K heads on the state h [..., d] behind a model's last norm; head k, 0-based, at token t guesses token t + 2 + k.

    Each head is ``num_layers`` times ``z + silu(W z + b)``, with ``projection`` then ``P z``, and then an LM head: its
    own if ``vocab_size`` is given, else the one that ``forward`` gets, as a rule the model's. W and b start at zero and
    P at the identity, so that every fresh head over the model's LM head gives the model's own logits.

    silu is nowhere below -0.28, so that over a shared LM head residual layers alone can hardly take back what h says
    of token t + 1. The projection can: it makes E P the head's own LM head at d * d weights instead of V * d.

    The first token of a draft's tree, t + 1, is known when the heads guess. With ``root`` each head adds ``R e`` of
    its embedding e to what its LM head reads, as Hydra's heads look at the tokens before theirs (arXiv 2402.05109); R
    starts at zero.

    Attributes:
        weight: ``[layers, K, d, d]``; bias: ``[layers, K, d]``; projections, roots: ``[K, d, d]`` or None; lm_heads:
            ``[K, V, d]`` or None.
        acceptance: ``[K][ranks]``, how often head k's guess of that rank was the token; None if never counted.
    """

    projections: nn.Parameter | None
    roots: nn.Parameter | None
    lm_heads: nn.Parameter | None

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_layers: int = 1,
        vocab_size: int | None = None,
        *,
        projection: bool = False,
        root: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        sizes = {"hidden_size": hidden_size, "num_heads": num_heads, "num_layers": num_layers}
        if vocab_size is not None:
            sizes["vocab_size"] = vocab_size
        for name, size in sizes.items():
            if not isinstance(size, int) or size <= 0:
                raise ValueError(f"MedusaHeads: {name}: expected a positive integer, got {size!r}")
        self.hidden_size, self.num_heads, self.num_layers, self.vocab_size = (
            hidden_size, num_heads, num_layers, vocab_size,
        )  # fmt: skip
        self.acceptance: list[list[float]] | None = None

        def zeros(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.zeros(*shape, dtype=dtype, device=device))

        self.weight = zeros(num_layers, num_heads, hidden_size, hidden_size)
        self.bias = zeros(num_layers, num_heads, hidden_size)
        identity = torch.eye(hidden_size, dtype=dtype, device=device).repeat(num_heads, 1, 1) if projection else None
        self.register_parameter("projections", None if identity is None else nn.Parameter(identity))
        self.register_parameter("roots", zeros(num_heads, hidden_size, hidden_size) if root else None)
        own = None if vocab_size is None else zeros(num_heads, vocab_size, hidden_size)
        self.register_parameter("lm_heads", own)

    def forward(
        self, hidden: Tensor, lm_head: Tensor | None = None, *, root: Tensor | None = None, heads: int | None = None
    ) -> Tensor:
        """Logits ``[K, ..., V]`` of hidden ``[..., d]``, over lm_head ``[V, d]`` unless the heads have their own, and
        of the root's embedding ``[..., d]`` where they look at it; ``heads`` asks for the first so many heads only.

        In torch's own operators; a draft's tokens come faster from ``ops.medusa_draft``.
        """
        self._check(hidden, lm_head)
        heads = self.num_heads if heads is None else heads
        if not 1 <= heads <= self.num_heads:
            raise ValueError(f"MedusaHeads: heads: expected 1 to {self.num_heads}, got {heads}")
        z = self.states(hidden, root)[:heads]
        if self.lm_heads is None:
            return F.linear(z, lm_head)  # type: ignore[arg-type]
        return torch.stack([F.linear(z[k], self.lm_heads[k]) for k in range(heads)])

    def states(self, hidden: Tensor, root: Tensor | None = None) -> Tensor:
        """What the LM heads read, ``[K, ..., d]`` of hidden and root ``[..., d]``, in torch's own operators."""
        self._check_root(hidden, root)
        rows = hidden.reshape(-1, self.hidden_size).expand(self.num_heads, -1, -1)
        for weight, bias in zip(self.weight, self.bias, strict=True):
            rows = rows + F.silu(torch.baddbmm(bias.unsqueeze(1), rows, weight.transpose(1, 2)))
        if self.projections is not None:
            rows = torch.bmm(rows, self.projections.transpose(1, 2))
        if self.roots is not None and root is not None:
            before = root.reshape(-1, self.hidden_size).expand(self.num_heads, -1, -1)
            rows = rows + torch.bmm(before, self.roots.transpose(1, 2))
        return rows.view(self.num_heads, *hidden.shape)

    def _check(self, hidden: Tensor, lm_head: Tensor | None) -> None:
        size = self.hidden_size
        if hidden.dim() < 1 or hidden.shape[-1] != size:
            raise ValueError(f"MedusaHeads: hidden: expected shape [..., {size}], got {list(hidden.shape)}")
        if self.lm_heads is not None:
            if lm_head is not None:
                raise ValueError("MedusaHeads: lm_head: expected None, for the heads have their own, got a tensor")
        elif lm_head is None:
            raise ValueError(
                "MedusaHeads: lm_head: expected the model's, for the heads have none of their own, got None"
            )
        elif lm_head.dim() != 2 or lm_head.shape[1] != size:
            raise ValueError(f"MedusaHeads: lm_head: expected shape [V, {size}], got {list(lm_head.shape)}")

    def _check_root(self, hidden: Tensor, root: Tensor | None) -> None:
        if (self.roots is None) != (root is None):
            expected = "None, for the heads do not look at it" if self.roots is None else "the root's embedding"
            raise ValueError(f"MedusaHeads: root: expected {expected}, got {'None' if root is None else 'a tensor'}")
        if root is not None and root.shape != hidden.shape:
            raise ValueError(f"MedusaHeads: root: expected shape {list(hidden.shape)}, got {list(root.shape)}")

    def checkpoint_tensors(self) -> dict[str, Tensor]:
        """Views of every weight under the names of Medusa checkpoints: ``{head}.{layer}.linear.weight`` and ``.bias``;
        an own LM head is ``{head}.{num_layers}.weight``. Ours alone are ``{head}.projection.weight`` and
        ``{head}.root.weight``."""
        named: dict[str, Tensor] = {}
        for k in range(self.num_heads):
            for layer in range(self.num_layers):
                named[f"{k}.{layer}.linear.weight"] = self.weight[layer, k]
                named[f"{k}.{layer}.linear.bias"] = self.bias[layer, k]
            if self.projections is not None:
                named[f"{k}.projection.weight"] = self.projections[k]
            if self.roots is not None:
                named[f"{k}.root.weight"] = self.roots[k]
            if self.lm_heads is not None:
                named[f"{k}.{self.num_layers}.weight"] = self.lm_heads[k]
        return named

    @classmethod
    def from_pretrained(
        cls,
        directory: str | Path,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> MedusaHeads:
        """Loads ``config.json`` and the safetensors of a directory; dtype None takes the configuration's.

        Without LM heads in the files the heads share the model's; without projections they have none.
        """
        source = str(Path(directory) / "config.json")
        raw = read_json(Path(source))
        if raw.get("model_type", MODEL_TYPE) != MODEL_TYPE:
            raise CheckpointError(source, "model_type", f"expected {MODEL_TYPE!r}, got {raw['model_type']!r}")

        def size(name: str) -> int:
            value = raw.get(name)
            if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
                found = "nothing" if name not in raw else repr(value)
                raise CheckpointError(source, name, f"expected a positive integer, got {found}")
            return value

        hidden, heads, layers = size("hidden_size"), size("medusa_num_heads"), size("medusa_num_layers")
        dtype = dtype or parse_dtype(str(raw.get("dtype") or raw.get("torch_dtype") or "float32"), source)
        files = TensorFiles(directory)
        own = any(f"{k}.{layers}.weight" in files.names() for k in range(heads))
        model = cls(
            hidden, heads, layers, size("vocab_size") if own else None,
            projection=any(f"{k}.projection.weight" in files.names() for k in range(heads)),
            root=any(f"{k}.root.weight" in files.names() for k in range(heads)),
            dtype=dtype, device=device,
        )  # fmt: skip
        model.acceptance = _acceptance(raw, heads, source)
        named = model.checkpoint_tensors()
        with torch.no_grad():
            for name, target in named.items():
                files.copy_into(name, target)
        unknown = sorted(files.names() - named.keys())
        if unknown:
            raise CheckpointError(
                str(files.source), unknown[0], f"expected no such tensor in {heads} heads of {layers} layers"
            )
        return model.eval()

    def save_pretrained(self, directory: str | Path, **fields: Any) -> None:
        """Writes ``model.safetensors`` and then ``config.json``, with ``fields`` added to the latter."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        save_tensors(directory, self.checkpoint_tensors(), 4 << 30)
        raw: dict[str, Any] = {
            "model_type": MODEL_TYPE,
            "hidden_size": self.hidden_size,
            "medusa_num_heads": self.num_heads,
            "medusa_num_layers": self.num_layers,
            "dtype": str(self.weight.dtype).removeprefix("torch."),
        }
        if self.vocab_size is not None:
            raw["vocab_size"] = self.vocab_size
        if self.acceptance is not None:
            raw["acceptance"] = self.acceptance
        write_json(directory / "config.json", raw | fields)


def medusa_loss(
    hidden: Tensor,
    tokens: Tensor,
    heads: MedusaHeads,
    lm_head: Tensor | None = None,
    decay: float = 0.8,
    *,
    embedding: Tensor | None = None,
) -> Tensor:
    """Sum over heads of ``decay**k`` times the mean cross entropy of head k against the token k + 2 further on.

    Args:
        hidden: ``[B, T, d]`` of a frozen model at the tokens.
        tokens: int64 ``[B, T]``; negative ones are no targets. A head without a target adds nothing.
        lm_head: ``[V, d]``, shared by heads without their own; embedding: ``[V, d]``, for heads that look at the root.

    Returns:
        A float32 scalar (float64 for float64), with a gradient for the heads.
    """
    if hidden.dim() != 3 or tokens.shape != hidden.shape[:2]:
        raise ValueError(
            f"medusa_loss: tokens: expected shape [B, T] beside hidden [B, T, d], "
            f"got {list(tokens.shape)} and {list(hidden.shape)}"
        )
    heads._check(hidden, lm_head)
    root = None
    if embedding is not None:  # the last position has no next token, and no target either
        root = embedding[torch.cat([tokens[:, 1:], tokens[:, :1]], 1).clamp(min=0)].to(hidden.dtype)
    z = heads.states(hidden, root)
    loss = z.new_zeros((), dtype=torch.promote_types(z.dtype, torch.float32))
    for k in range(heads.num_heads):
        targets = tokens[:, 2 + k :].flatten()
        count = (targets >= 0).sum()
        weight = lm_head if heads.lm_heads is None else heads.lm_heads[k]
        logits = F.linear(z[k, :, : max(0, tokens.shape[1] - 2 - k)], weight)  # type: ignore[arg-type]
        nats = F.cross_entropy(
            logits.flatten(0, 1).to(loss.dtype), targets.clamp(min=-1), ignore_index=-1, reduction="sum"
        )
        loss = loss + decay**k * nats / count.clamp(min=1)
    return loss


def _acceptance(raw: dict[str, Any], heads: int, source: str) -> list[list[float]] | None:
    """The table of a configuration, if it has one."""
    table = raw.get("acceptance")
    if table is None:
        return None
    if not isinstance(table, list) or len(table) != heads or not all(isinstance(row, list) and row for row in table):
        raise CheckpointError(source, "acceptance", f"expected {heads} rows, one a head, got {table!r:.60}")
    for share in (share for row in table for share in row):
        if not isinstance(share, int | float) or not 0 <= share <= 1:
            raise CheckpointError(source, "acceptance", f"expected shares from 0 to 1, got {share!r}")
    return [[float(share) for share in row] for row in table]
