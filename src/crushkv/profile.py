"""The profile of a model: which channels of its keys and queries carry how much, and how much each head needs.

Data in a small file, never code.
"""

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


FILE = FileKind("profile", "2", "`crushkv profile`", "make it again with `crushkv profile`", ProfileError)


@dataclass(frozen=True, eq=False)
class Profile:
    """Energies by channel, where the two channels that RoPE turns together have the same, and needs by head.

    Attributes:
        keys: float32 `[L, Hkv, D]`, mean square of the keys less their mean before RoPE; L: the compressed layers.
        queries: float32 `[L, Hkv, D]`, mean square of the queries of the heads that share a KV head.
        needs: float32 `[L, Hkv, N]`, descending: the greatest attention that the tokens of a head receive while a text
            is repeated, at N levels; see `core.heads.curve`.
        model: fingerprint of the model, the same for its weights in any dtype.
        model_type: its architecture, for messages.
        texts: names of the texts that were read.
        path: the file that it was read from or written to.
    """

    keys: Tensor
    queries: Tensor
    needs: Tensor
    model: str
    model_type: str = ""
    texts: tuple[str, ...] = ()
    path: Path | None = None

    def __post_init__(self) -> None:
        for name in ("keys", "queries", "needs"):
            tensor = getattr(self, name)
            if tensor.dtype != torch.float32 or tensor.ndim != 3 or not tensor.numel():
                raise ProfileError(
                    f"{self._where}{name} is {tensor.dtype} {list(tensor.shape)}: expected float32 [layers, heads, D]"
                )
            if not bool((tensor.isfinite() & (tensor >= 0)).all()):
                raise ProfileError(f"{self._where}{name} has numbers that are negative or not finite")
        if self.keys.shape != self.queries.shape:
            shapes = f"{list(self.keys.shape)} and {list(self.queries.shape)}"
            raise ProfileError(f"{self._where}keys and queries have different shapes ({shapes})")
        if self.needs.shape[:2] != self.keys.shape[:2]:
            raise ProfileError(f"{self._where}needs is of {list(self.needs.shape[:2])} layers and heads")
        if bool((self.needs.diff(dim=-1) > 0).any()):
            raise ProfileError(f"{self._where}needs does not descend")

    @property
    def _where(self) -> str:
        return "" if self.path is None else f"{self.path}: "

    def save(self, path: str | Path) -> Profile:
        """Writes it as safetensors, and returns it with its path.

        Raises:
            OutputError: the file cannot be written.
        """
        metadata = {"model": self.model, "model_type": self.model_type, "texts": json.dumps(self.texts)}
        FILE.write(Path(path), {"keys": self.keys, "queries": self.queries, "needs": self.needs}, metadata)
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
            keys, queries, needs = tensors["keys"], tensors["queries"], tensors["needs"]
            model, model_type = metadata["model"], metadata["model_type"]
        except (KeyError, ValueError, TypeError) as error:
            raise ProfileError(f"{path}: damaged ({type(error).__name__}: {error})") from None
        return cls(keys, queries, needs, model, model_type, texts, path)

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
