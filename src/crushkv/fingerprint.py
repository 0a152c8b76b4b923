"""What tells one model, or one set of tensors, from another."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .errors import ConfigError

# Enough of each parameter to tell weights apart, little enough to be read in a moment.
_SAMPLED = 64


def fingerprint(model: Any, any_dtype: bool = False) -> str:
    """Differs between models of another architecture, other weights (a sample of each parameter) or other RoPE.

    Args:
        model: a Transformers model; its weights may be offloaded by accelerate.
        any_dtype: False: weights in another dtype are another model. True: they are the same one, since of each number
            only the sign is read, which no cast changes. Signs tell fine-tuned weights apart all the same: among many
            thousands, some are of numbers near zero.

    Raises:
        ConfigError: weights are nowhere to be found, unless with `any_dtype`, where names and shapes have to do.
    """
    digest = hashlib.sha256()
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(prefix=path, recurse=False):
            dtype = "" if any_dtype else f" {parameter.dtype}"
            digest.update(f"{name} {tuple(parameter.shape)}{dtype}".encode())
            value = _offloaded(module, name.rpartition(".")[2]) if parameter.is_meta else parameter
            if value is None:
                if any_dtype:
                    continue  # the names and shapes have to do
                raise ConfigError(
                    f"model: its parameter {name!r} is on the meta device, and no hook of accelerate says where its "
                    "numbers are: load the model before its caches are saved or read"
                )
            sample = value.detach().flatten()[:: max(1, value.numel() // _SAMPLED)].contiguous().cpu()
            if any_dtype and sample.is_floating_point():
                sample = sample.signbit()
            digest.update(sample.view(torch.uint8).numpy().tobytes())
    # Positions are no parameters, and stand in the keys.
    config = model.config.get_text_config(decoder=True)
    digest.update(json.dumps(getattr(config, "rope_parameters", None), sort_keys=True, default=str).encode())
    if any_dtype:
        digest.update(f"{config.model_type} {getattr(config, 'num_attention_heads', None)}".encode())
    return digest.hexdigest()


def _offloaded(module: nn.Module, name: str) -> Tensor | None:
    """A parameter that accelerate has put elsewhere."""
    hook = getattr(module, "_hf_hook", None)
    for one in getattr(hook, "hooks", [hook]):
        weights = getattr(one, "weights_map", None)
        if weights is not None and name in weights:
            value: Tensor = weights[name]
            return value
    return None


def digest_of(tensors: Mapping[str, Tensor], text: str = "") -> str:
    """Differs wherever a name, a shape, a dtype or a bit of these tensors does, or the text."""
    digest = hashlib.sha256(text.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
