"""Two cases of Transformers' `sdpa` that a CPU has a faster way for, with the same result."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from ..importance import attention_with_mass

# Arguments that do not change what Transformers' `sdpa` computes (or say only what the mask says already).
_WITHOUT_EFFECT = frozenset(
    {
        "cache_position",
        "deterministic",
        "layer_idx",
        "logits_to_keep",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "position_ids",
        "return_dict",
        "sliding_window",
        "use_cache",
    }
)


def replaceable(
    module: torch.nn.Module,
    function: Callable[..., Any] | None,
    query: Tensor,
    mask: Tensor | None,
    kwargs: Mapping[str, Any],
) -> bool:
    """Whether a call is plain causal attention on a CPU by Transformers' own function, with nothing masked or added.

    An argument that is not known to be without effect makes it another call.
    """
    return (
        function is sdpa_attention_forward
        and query.device.type == "cpu"
        and mask is None
        and (is_causal(module, kwargs) or query.shape[2] == 1)
        and not kwargs.get("dropout")
        and all(
            value is None or name in ("scaling", "dropout", "is_causal") or name in _WITHOUT_EFFECT
            for name, value in kwargs.items()
        )
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
    )


def is_causal(module: torch.nn.Module, kwargs: Mapping[str, Any]) -> bool:
    """Whether attention without a mask hides later tokens, as Transformers' own functions decide it."""
    causal = kwargs.get("is_causal")
    return bool(getattr(module, "is_causal", True) if causal is None else causal)


def decode(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """Attention of one token, `query [B, Hq, 1, D]`: `[B, 1, Hq, Dv]`.

    The query heads of a group become queries of its KV head: keys and values are read once for all of them.
    """
    rows, heads, _, size = query.shape
    packed = query.reshape(rows, key.shape[1], -1, size)
    return F.scaled_dot_product_attention(packed, key, value, scale=scaling).reshape(rows, 1, heads, -1)


def prefill_with_mass(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """Attention of a whole prompt, `[B, S, Hq, Dv]`, and the mass `[B, Hq, S]` that each token receives in it.

    A streaming policy would compute QK^T once more.
    """
    output, mass = attention_with_mass(query, key, value, scaling)
    return output.transpose(1, 2).contiguous(), mass
