"""Whether what was prepared for a storage is for the blocks that it holds now."""

from __future__ import annotations

from weakref import ref

from torch import Tensor

from ..storage import TieredStorage


class BlockTensors:
    """The tensors of a storage's blocks, known again and not kept alive: an eviction has to free them.

    They are others whenever tokens move. All of them are compared, since kernels know their addresses.
    """

    def __init__(self, store: TieredStorage) -> None:
        self._references = [ref(tensor) for tensor in _tensors(store)]

    def __contains__(self, tensor: Tensor) -> bool:
        return any(reference() is tensor for reference in self._references)

    def are_of(self, store: TieredStorage) -> bool:
        tensors = _tensors(store)
        return len(tensors) == len(self._references) and all(
            reference() is tensor for reference, tensor in zip(self._references, tensors, strict=True)
        )


def _tensors(store: TieredStorage) -> list[Tensor]:
    return [tensor for block in store.blocks for part in block for tensor in part.tensors.values()]
