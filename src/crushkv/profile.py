"""The profile of a model: which channels of its keys and queries carry how much. Data in a small file, never code."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import CrushError
from .fingerprint import fingerprint
from .tensor_file import FileKind


class ProfileError(CrushError):
    """A file holds no profile that this model and this version of crushkv can use, or none can be made."""


FILE = FileKind("profile", "1", "`crushkv profile`", "make it again with `crushkv profile`", ProfileError)


@dataclass(frozen=True, eq=False)
class Profile:
    """Energies by channel, where the two channels that RoPE turns together have the same.

    Attributes:
        keys: float32 `[L, Hkv, D]`, mean square of the keys less their mean before RoPE; L: the compressed layers.
        queries: float32 `[L, Hkv, D]`, mean square of the queries of the heads that share a KV head.
        model: fingerprint of the model, the same for its weights in any dtype.
        model_type: its architecture, for messages.
        texts: names of the texts that were read.
        path: the file that it was read from or written to.
    """

    keys: Tensor
    queries: Tensor
    model: str
    model_type: str = ""
    texts: tuple[str, ...] = ()
    path: Path | None = None

    def __post_init__(self) -> None:
        for name in ("keys", "queries"):
            tensor = getattr(self, name)
            if tensor.dtype != torch.float32 or tensor.ndim != 3 or not tensor.numel():
                raise ProfileError(
                    f"{self._where}{name} is {tensor.dtype} {list(tensor.shape)}: expected float32 [layers, heads, D]"
                )
            if not bool((tensor.isfinite() & (tensor >= 0)).all()):
                raise ProfileError(f"{self._where}{name} has numbers that are negative or not finite: no energies")
        if self.keys.shape != self.queries.shape:
            shapes = f"{list(self.keys.shape)} and {list(self.queries.shape)}"
            raise ProfileError(f"{self._where}keys and queries have different shapes ({shapes})")

    @property
    def _where(self) -> str:
        return "" if self.path is None else f"{self.path}: "

    def save(self, path: str | Path) -> Profile:
        """Writes it as safetensors, and returns it with its path.

        Raises:
            OutputError: the file cannot be written.
        """
        metadata = {"model": self.model, "model_type": self.model_type, "texts": json.dumps(self.texts)}
        FILE.write(Path(path), {"keys": self.keys, "queries": self.queries}, metadata)
        return replace(self, path=Path(path))

    @classmethod
    def load(cls, path: str | Path) -> Profile:
        """Reads a file that `save` wrote.

        Raises:
            ProfileError: it cannot be read, is damaged, or comes from another version.
        """
        path = Path(path)
        metadata, tensors = FILE.read(path)
        try:
            texts = tuple(json.loads(metadata["texts"]))
            keys, queries = tensors["keys"], tensors["queries"]
            model, model_type = metadata["model"], metadata["model_type"]
        except (KeyError, ValueError, TypeError) as error:
            raise ProfileError(f"{path}: damaged ({type(error).__name__}: {error})") from None
        return cls(keys, queries, model, model_type, texts, path)

    def check(self, model: Any) -> None:
        """Refuses a model that it was not made from; weights in another dtype are the same model.

        Raises:
            ProfileError: names the file.
        """
        if self.model != fingerprint(model, any_dtype=True):
            raise ProfileError(
                f"{self._where}the profile was made from another model ({self.model_type}) or from other weights: make "
                "one with `crushkv profile`"
            )
