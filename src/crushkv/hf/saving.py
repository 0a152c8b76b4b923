"""Compressed caches as files: read a document once, answer questions about it in other processes."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from .._version import __version__
from ..config import CrushConfig
from ..errors import ConfigError, CrushError
from ..files import replacing
from . import left_alone
from .cache import CrushCache
from .layer import CrushLayer

FORMAT = "crushkv cache"
FORMAT_VERSION = "2"  # changes whenever older code could not read a file, or newer code an older one
# Enough of each parameter to tell weights apart, little enough to be read in a moment.
_SAMPLED = 64


class SavedCacheError(CrushError):
    """A file holds no cache that this model and this version of crushkv can use."""


@dataclass(frozen=True)
class SavedCache:
    """A cache read from a file.

    Attributes:
        config: what it was compressed with.
        input_ids: int64 `[B, S]`, the tokens that were read. Give `generate` these and the further ones together.
        notes: what was saved beside it.
    """

    config: CrushConfig
    input_ids: Tensor
    notes: dict[str, Any]
    _model: PreTrainedModel
    _layers: list[tuple[dict[str, Tensor], dict[str, int]]]

    def cache(self) -> CrushCache:
        """A cache as it was when it was saved. Each call makes a new one, for one conversation each."""
        cache = CrushCache(self._model, self.config)
        for layer, (tensors, counts) in zip(cache.layers, self._layers, strict=True):
            # In main memory: the first pass moves each layer to where the model computes it.
            tensors = {name: tensor.clone() for name, tensor in tensors.items()}
            if isinstance(layer, CrushLayer):
                layer.load_state(tensors, counts)
            else:
                left_alone.load_state(layer, tensors, counts)
        return cache


def save_cache(
    path: str | Path,
    cache: CrushCache,
    model: PreTrainedModel,
    input_ids: Tensor,
    notes: Mapping[str, Any] | None = None,
) -> None:
    """Writes a cache with its configuration as safetensors.

    Args:
        cache: filled by `model`.
        input_ids: int64 `[B, S]`, all tokens that the cache has seen.
        notes: JSON values to find again beside it.

    Raises:
        ConfigError: the cache is empty, or has not seen these tokens.
        OutputError: the file cannot be written.
    """
    seen = cache.get_seq_length()
    if not seen or seen != input_ids.shape[-1]:
        raise ConfigError(f"input_ids of {input_ids.shape[-1]} tokens: the cache has seen {seen}")
    tensors = {"input_ids": input_ids.cpu().contiguous()}
    counts = []
    for index, layer in enumerate(cache.layers):
        state, numbers = layer.state() if isinstance(layer, CrushLayer) else left_alone.state(layer)
        tensors |= {f"{index}.{name}": tensor.detach().cpu().contiguous() for name, tensor in state.items()}
        counts.append(numbers)
    metadata = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "crushkv": __version__,
        "model": fingerprint(model),
        "model_type": str(model.config.model_type),
        "config": cache.config.to_json(),
        "layers": json.dumps(counts),
        "notes": json.dumps(dict(notes or {})),
        "digest": _digest(tensors),
    }
    with replacing(Path(path)) as temporary:
        save_file(tensors, temporary, metadata)


def load_cache(path: str | Path, model: PreTrainedModel) -> SavedCache:
    """Reads a file that `save_cache` wrote.

    Raises:
        SavedCacheError: it cannot be read, is damaged, or comes from another model or another version.
    """
    metadata, tensors = _read(Path(path), with_tensors=True)
    try:
        counts = json.loads(metadata["layers"])
        config, notes = CrushConfig.from_json(metadata["config"]), json.loads(metadata["notes"])
        same = metadata["digest"] == _digest(tensors)
        belongs = metadata["model"] == fingerprint(model)
    except (KeyError, ValueError) as error:
        raise SavedCacheError(f"{path}: damaged ({error})") from None
    if not same:
        raise SavedCacheError(f"{path}: damaged: its contents are not those that were written")
    if not belongs:
        raise SavedCacheError(
            f"{path}: it was built with another model ({metadata.get('model_type')}), other weights or another dtype"
        )
    layers: list[tuple[dict[str, Tensor], dict[str, int]]] = [({}, numbers) for numbers in counts]
    input_ids = tensors.pop("input_ids")
    for name, tensor in tensors.items():
        index, _, field = name.partition(".")
        layers[int(index)][0][field] = tensor
    return SavedCache(config, input_ids, notes, model, layers)


def read_notes(path: str | Path) -> dict[str, Any]:
    """What was saved beside a cache, without reading the cache.

    Raises:
        SavedCacheError: see `load_cache`.
    """
    metadata, _ = _read(Path(path), with_tensors=False)
    try:
        return dict(json.loads(metadata["notes"]))
    except (KeyError, ValueError, TypeError) as error:
        raise SavedCacheError(f"{path}: damaged ({error})") from None


def _read(path: Path, with_tensors: bool) -> tuple[dict[str, str], dict[str, Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata: dict[str, str] = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise SavedCacheError(f"{path}: this is no cache of crushkv")
            if metadata.get("format_version") != FORMAT_VERSION:
                raise SavedCacheError(
                    f"{path}: written by crushkv {metadata.get('crushkv')} in format "
                    f"{metadata.get('format_version')}, this is crushkv {__version__} with format {FORMAT_VERSION}: "
                    "build it again"
                )
            names = file.keys() if with_tensors else []
            return metadata, {name: file.get_tensor(name) for name in names}
    except (OSError, SafetensorError) as error:
        raise SavedCacheError(f"{path}: {error}") from None


def fingerprint(model: PreTrainedModel) -> str:
    """Differs between models whose caches differ: architecture, weights (a sample of each parameter), dtype."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        weight = _offloaded(model, name) if parameter.is_meta else parameter.detach()
        sample = weight.flatten()[:: max(1, parameter.numel() // _SAMPLED)].contiguous().cpu()
        digest.update(sample.view(torch.uint8).numpy().tobytes())
    # Positions are no parameters, and stand in the keys.
    config = model.config.get_text_config(decoder=True)
    digest.update(json.dumps(getattr(config, "rope_parameters", None), sort_keys=True, default=str).encode())
    return digest.hexdigest()


def _offloaded(model: PreTrainedModel, name: str) -> Tensor:
    """A parameter that accelerate keeps elsewhere, from the hook that will bring it.

    Raises:
        ConfigError: nothing says where it is.
    """
    owner, _, own = name.rpartition(".")
    hook = getattr(model.get_submodule(owner), "_hf_hook", None)
    for part in (hook, *getattr(hook, "hooks", ())):
        with contextlib.suppress(KeyError, TypeError):  # a hook without weights, or without these
            return torch.as_tensor(getattr(part, "weights_map", None)[own])  # type: ignore[index]
    raise ConfigError(
        f"model: its parameter {name!r} is on the meta device, and no hook of accelerate says where its numbers are: "
        "load the model before its caches are saved or read"
    )


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
