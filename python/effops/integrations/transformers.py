"""``attn_implementation="effops"`` and ``experts_implementation="effops"`` for Transformers models.

    import effops.integrations.transformers as integration
    integration.register()
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="effops", experts_implementation="effops")

Either may be given alone; :mod:`effops.integrations.experts` is the second.

The mask function returns a short description of the mask (padding, window, lengths) instead of a dense
tensor; masks that have no such description are refused when the model builds them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from effops import ops
from effops.integrations.experts import experts_forward
from effops.integrations.experts import pack_experts_ as pack_experts_

try:
    from transformers import AttentionInterface
    from transformers.masking_utils import (
        AttentionMaskInterface,
        bidirectional_mask_function,
        causal_mask_function,
    )
except ImportError:
    raise ImportError("transformers is needed: pip install 'transformers>=5'") from None

NAME = "effops"


def register() -> None:
    """Makes ``attn_implementation="effops"`` known to Transformers, and ``experts_implementation="effops"`` where it
    has that choice; calling it again changes nothing."""
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, describe_mask)
    try:
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    except ImportError:  # an older Transformers 5, which has no such choice
        return
    ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)


def describe_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int | Tensor = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    device: torch.device | str = "cpu",
    **_: Any,
) -> Tensor:
    """Describes a mask function and a padding mask bool [B,S]; called once a forward pass by the model.

    Returns int32 [B,1,1,4]: first key, number of keys, 1 if causal, window (0 for none). Four dimensions,
    so that Transformers hands it to the layers as it is. Padding may stand on the left, or on the right of
    whole sequences, whose padded rows are then unspecified.
    """
    causal, window = _rule_of(mask_function)
    first, past = int(kv_offset), int(q_offset) + q_length if causal else int(kv_offset) + kv_length
    end = past - first
    if not 0 <= end <= kv_length:
        raise ValueError(
            f"effops: mask: expected the queries to end within {kv_length} keys, got {end} "
            f"(q_offset {int(q_offset)}, q_length {q_length}, kv_offset {first})"
        )
    described = torch.tensor([0, end, int(causal), window], dtype=torch.int32, device=device)
    described = described.repeat(batch_size, 1, 1, 1)
    if attention_mask is not None:
        starts = _left_padding(attention_mask, past, whole=q_length == past, causal=causal)
        described[:, 0, 0, 0] = (starts - first).clamp(min=0)
    return described


def _rule_of(mask_function: Callable[..., Any]) -> tuple[bool, int]:
    """Whether a mask function is causal, and its window, by looking at how Transformers composed it."""
    if mask_function is causal_mask_function:
        return True, 0
    if mask_function is bidirectional_mask_function:
        return False, 0
    parts = _closed_over(mask_function, "mask_functions")
    if parts is not None and len(parts) == 2 and parts[1] is causal_mask_function:
        window = _closed_over(parts[0], "sliding_window")
        if window is not None and parts[0].__qualname__.startswith("sliding_window_overlay."):
            return True, int(window)
    name = getattr(mask_function, "__qualname__", repr(mask_function))
    raise ValueError(
        "effops: mask: expected a causal, sliding-window causal or bidirectional mask, "
        f"got {name} (packed sequences, blockwise, chunked and custom masks are not supported)"
    )


def _closed_over(function: Callable[..., Any], variable: str) -> Any:
    code = getattr(function, "__code__", None)
    if code is None or variable not in code.co_freevars:
        return None
    return (function.__closure__ or ())[code.co_freevars.index(variable)].cell_contents


def _left_padding(attention_mask: Tensor, end: int, *, whole: bool, causal: bool) -> Tensor:
    """First real token of each row of a padding mask [B,S], int64 [B]."""
    real = attention_mask[:, :end].bool()
    place = torch.arange(real.shape[1], device=real.device)
    first = torch.where(real, place, end).amin(-1)
    past = torch.where(real, place + 1, first[:, None]).amax(-1)
    if bool((past - first != real.sum(-1)).any()):
        raise ValueError("effops: attention_mask: expected one run of real tokens a row, got a gap")
    if bool((past < end).any()) and not (whole and causal):
        raise ValueError("effops: attention_mask: expected padding on the left, got padding on the right")
    return first


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of query [B,H,T,D] over key [B,G,L,D], value [B,G,L,Dv], as a Transformers layer calls it.

    Returns out [B,T,H,Dv] and no weights. ``s_aux`` [H] are learned sink logits.
    """
    if dropout:
        raise ValueError(f"effops: dropout: expected 0, got {dropout}")
    for name in ("output_attentions", "head_mask", "position_bias", "cache"):
        given = kwargs.get(name)
        if given is not None and given is not False:
            raise ValueError(f"effops: {name}: expected None, got {type(given).__name__}")
    window = sliding_window or 0
    kv_starts = kv_lens = None
    if attention_mask is None:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    elif attention_mask.dtype == torch.int32:
        kv_starts, kv_lens = attention_mask[:, 0, 0, 0], attention_mask[:, 0, 0, 1]
        causal, described = attention_mask[0, 0, 0, 2:].tolist()
        if described != window:
            raise ValueError(f"effops: sliding_window: expected the mask's {described}, got {window}")
    else:
        raise ValueError(
            "effops: attention_mask: expected a padding mask of shape [batch, tokens], "
            f"got a dense mask of shape {list(attention_mask.shape)}"
        )
    out = ops.attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        kv_lens=kv_lens,
        kv_starts=kv_starts,
        causal=bool(causal),
        window=window,
        softcap=softcap or 0.0,
        scale=scaling,
        sink_logits=None if s_aux is None else s_aux.float(),
    )
    assert isinstance(out, Tensor)
    return out, None
