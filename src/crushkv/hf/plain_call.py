"""Which attention calls ask for softmax attention and nothing else, so that any way to compute it will do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

# Arguments that do not change what Transformers' own functions compute (or say only what the mask says already).
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


def is_plain(query: Tensor, kwargs: Mapping[str, Any]) -> bool:
    """Whether a call of a registered attention function adds nothing to the softmax, and needs no gradient.

    An argument that is not known to be without effect makes it another call.
    """
    return (
        not kwargs.get("dropout")
        and all(
            value is None or name in ("scaling", "dropout", "is_causal") or name in _WITHOUT_EFFECT
            for name, value in kwargs.items()
        )
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled(query.device.type)
    )


def is_causal(module: torch.nn.Module, kwargs: Mapping[str, Any]) -> bool:
    """Whether attention without a mask hides later tokens, as Transformers' own functions decide it."""
    causal = kwargs.get("is_causal")
    return bool(getattr(module, "is_causal", True) if causal is None else causal)
