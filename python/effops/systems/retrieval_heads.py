"""Which KV heads retrieve from afar and need every key: DuoAttention's training of one gate a head (arXiv 2410.10819,
section 2.2). The other heads can stream over the first and the last tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from effops import ops
from effops.models import Llama
from effops.systems.passes import Attend, hidden_states


class RetrievalHeadFinder(nn.Module):
    """Gates float32 ``[layers, G]``, from 1 (every key) to 0 (sinks and recent tokens), beside a frozen model.

    Two passes go over the same tokens. The teacher's sees every key. In the student's, KV head g of a layer gives
    ``(1 - gate) * stream + gate * full``, where ``stream`` is its own attention to the first ``num_sinks`` and the
    last ``recent`` keys, the query's own among them, and ``full`` the teacher's result in that layer. What trains the
    gates is how far the student's final hidden states are from the teacher's, and that each gate has a price.

    Raises:
        ValueError: latent attention, or layers with a window of their own.
    """

    def __init__(self, model: Llama, *, num_sinks: int = 16, recent: int = 64) -> None:
        super().__init__()
        c = model.config
        if c.latent is not None or any(c.windows):
            kind = "latent attention" if c.latent is not None else f"windows {c.windows}"
            raise ValueError(f"RetrievalHeadFinder: model: expected layers that see every key, got {kind}")
        if num_sinks < 0 or recent < 1:
            raise ValueError(
                f"RetrievalHeadFinder: num_sinks, recent: expected 0 or more and 1 or more, got {num_sinks}, {recent}"
            )
        self._model = (model,)  # in a tuple: its weights are not this module's
        self.num_sinks, self.recent = num_sinks, recent
        self.gates = nn.Parameter(torch.ones(c.num_hidden_layers, c.num_key_value_heads, device=model.device))

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The final hidden states [B,T,d], normed, of the teacher and of the student for tokens int64 [B,T]."""
        (model,), full = self._model, list[Tensor]()

        def teach(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out = ops.attention(q, k, v, causal=True)
            full.append(out)
            return out

        with torch.no_grad():
            teacher = hidden_states(model, tokens, [teach] * len(self.gates))

        def learn(layer: int) -> Attend:
            def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                stream = ops.attention(q, k, v, causal=True, window=self.recent, num_sinks=self.num_sinks)
                gate = self.gates[layer].clamp(0, 1).repeat_interleave(q.shape[2] // k.shape[2])[:, None].to(q.dtype)
                return (1 - gate) * stream + gate * full[layer]

            return attend

        return teacher, hidden_states(model, tokens, [learn(i) for i in range(len(self.gates))])

    def loss(self, tokens: Tensor, supervised: Tensor, *, penalty: float = 0.05) -> Tensor:
        """The mean square of student less teacher over the tokens where ``supervised`` bool [B,T] says so, plus
        ``penalty`` times the mean gate."""
        teacher, student = self(tokens)
        distance = (student[supervised] - teacher[supervised]).square().mean()
        return distance + penalty * self.gates.clamp(0, 1).mean()

    def train_gates(
        self,
        samples: Iterable[tuple[Tensor, Tensor]],
        steps: int,
        *,
        learning_rate: float = 0.02,
        penalty: float = 0.05,
        progress: Callable[[int, int], None] = lambda *_: None,
    ) -> Tensor:
        """``steps`` steps of AdamW, each on one of ``samples`` (tokens, supervised), over a learning rate that rises
        for a fifth of them and falls for the last fifth. The gates, detached and within [0, 1]."""
        (model,) = self._model
        frozen = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW([self.gates], lr=learning_rate, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: trapezoid(s, steps))
        try:
            for parameter in frozen:
                parameter.requires_grad_(False)
            for i, (tokens, supervised) in zip(range(steps), samples, strict=False):
                progress(i, steps)
                optimizer.zero_grad()
                self.loss(tokens, supervised, penalty=penalty).backward()
                optimizer.step()
                schedule.step()
                with torch.no_grad():
                    self.gates.clamp_(0, 1)
        finally:
            for parameter in frozen:
                parameter.requires_grad_(True)
        return self.gates.detach().clone()


def trapezoid(step: int, steps: int) -> float:
    """The factor on the learning rate at ``step`` of ``steps``: up over the first fifth, down over the last, never
    under a tenth."""
    fifth = steps / 5
    return min(1.0, max((step + 1) / fifth, 0.1), max((steps - step) / fifth, 0.1))


def choose_heads(gates: Tensor, sparsity: float) -> Tensor:
    """The heads that keep every key, bool ``[layers, G]``: those whose gate is not below the ``sparsity``-quantile of
    all gates. 0: all of them, 1: none. Of equal gates the first heads are kept, so that the number is exact.

    Raises:
        ValueError: a gate that is no number, or sparsity outside [0, 1].
    """
    if not 0 <= sparsity <= 1:
        raise ValueError(f"choose_heads: sparsity: expected a number in [0, 1], got {sparsity}")
    if not bool(gates.isfinite().all()):
        raise ValueError("choose_heads: gates: expected finite numbers, got others")
    count = gates.numel()
    # So many lie below the quantile, which stands at place sparsity * (count - 1) of the sorted gates.
    streaming = count if sparsity == 1 else math.ceil(sparsity * (count - 1) - 1e-9)
    kept = torch.zeros(count, dtype=torch.bool, device=gates.device)
    kept[gates.flatten().argsort(descending=True, stable=True)[: count - streaming]] = True
    return kept.view_as(gates)
