"""Compressed caches as files: read a document once, answer questions about it in other processes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..config import CrushConfig
from ..errors import ConfigError, CrushError, UnsupportedModelError, one_line
from ..fingerprint import fingerprint
from ..tensor_file import FileKind
from . import left_alone
from .cache import CrushCache
from .integrity import Damaged, check_counts, check_layer
from .layer import CrushLayer


class SavedCacheError(CrushError):
    """A file holds no cache that this model and this version of crushkv can use."""


FILE = FileKind("cache", "3", "`crushkv build` or save_cache", "build it again", SavedCacheError)


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
                left_alone.load_state(layer, tensors, counts["seen"])
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
    tensors = {"input_ids": input_ids}
    counts = []
    for index, layer in enumerate(cache.layers):
        state, numbers = layer.state() if isinstance(layer, CrushLayer) else (left_alone.state(layer), {"seen": seen})
        tensors |= {f"{index}.{name}": tensor for name, tensor in state.items()}
        counts.append(numbers)
    metadata = {
        "model": fingerprint(model),
        "model_type": str(model.config.model_type),
        "config": cache.config.to_json(),
        "layers": json.dumps(counts),
        "notes": json.dumps(dict(notes or {})),
    }
    FILE.write(Path(path), tensors, metadata)


def load_cache(path: str | Path, model: PreTrainedModel) -> SavedCache:
    """Reads a file that `save_cache` wrote.

    Raises:
        SavedCacheError: it cannot be read, is damaged, or comes from another model or another version.
    """
    metadata, tensors = FILE.read(Path(path))
    try:
        counts = json.loads(metadata["layers"])
        config, notes = CrushConfig.from_json(metadata["config"]), dict(json.loads(metadata["notes"]))
    except (KeyError, ValueError, TypeError, RecursionError) as error:
        raise SavedCacheError(f"{path}: damaged ({error})") from None
    if metadata.get("model") != fingerprint(model):
        raise SavedCacheError(
            f"{path}: it was built with another model ({metadata.get('model_type')}), other weights or another dtype"
        )
    try:
        saved = _assemble(model, config, notes, counts, tensors)
        _check(saved)
    except UnsupportedModelError:
        raise
    except Exception as error:  # whatever storage makes of tensors that it has never written
        raise SavedCacheError(f"{path}: damaged ({one_line(str(error)) or type(error).__name__})") from None
    return saved


def _assemble(
    model: PreTrainedModel, config: CrushConfig, notes: dict[str, Any], counts: Any, tensors: dict[str, Tensor]
) -> SavedCache:
    """Sorts the tensors of a file by layer."""
    if not isinstance(counts, list):
        raise Damaged("there is no list of layers")
    layers: list[tuple[dict[str, Tensor], dict[str, int]]] = [({}, numbers) for numbers in counts]
    input_ids = tensors.pop("input_ids", None)
    if input_ids is None or input_ids.ndim != 2 or not input_ids.numel() or input_ids.dtype != torch.int64:
        raise Damaged("there are no input_ids [rows, tokens]")
    for name, tensor in tensors.items():
        index, _, field = name.partition(".")
        if not index.isdecimal() or int(index) >= len(layers):
            raise Damaged(f"{name!r} belongs to no layer")
        layers[int(index)][0][field] = tensor
    return SavedCache(config, input_ids, notes, model, layers)


def _check(saved: SavedCache) -> None:
    """Raises whatever is wrong with the state of its layers."""
    seen = saved.input_ids.shape[1]
    held = CrushCache(saved._model, saved.config).layers
    if len(held) != len(saved._layers):
        raise Damaged(f"it has {len(saved._layers)} layers, and the model {len(held)}")
    for layer, (_, counts) in zip(held, saved._layers, strict=True):
        check_counts(counts, ("seen", "since_eviction") if isinstance(layer, CrushLayer) else ("seen",), seen)
    for layer, (tensors, _) in zip(saved.cache().layers, saved._layers, strict=True):
        if isinstance(layer, CrushLayer):
            check_layer(layer, tensors, saved.input_ids)
        elif any(tensor.shape[:1] != saved.input_ids.shape[:1] for tensor in tensors.values()):
            raise Damaged("what a layer that is not compressed holds is not of these rows")


def read_notes(path: str | Path) -> dict[str, Any]:
    """What was saved beside a cache, without reading the cache.

    Raises:
        SavedCacheError: see `load_cache`.
    """
    try:
        return dict(json.loads(FILE.read_header(Path(path))["notes"]))
    except (KeyError, ValueError, TypeError) as error:
        raise SavedCacheError(f"{path}: damaged ({error})") from None
