"""The last queries of each request, carried from step to step: all requests of a layer in one buffer."""

from __future__ import annotations

import torch
from torch import Tensor


class QueryTails:
    """Rings of `length` queries, one for each request that is near an eviction.

    The query of position p stands in its request's ring at p modulo length, in every layer. What a step writes is
    worked out once (`places`), and each layer then copies it in one operation (`record`).
    """

    def __init__(self, layers: int, length: int) -> None:
        self.length = length
        self._slots: dict[str, int] = {}
        self._free: list[int] = []
        self._buffers: list[Tensor | None] = [None] * layers  # [slots * length, Hq, D]

    def places(self, request_id: str, start: int, end: int) -> list[int]:
        """Where the queries of positions `start` to `end` go; at most `length` of them."""
        slot = self._slots.get(request_id)
        if slot is None:
            slot = self._slots[request_id] = self._free.pop() if self._free else len(self._slots)
        first = slot * self.length
        return [first + position % self.length for position in range(start, end)]

    def record(self, layer: int, queries: Tensor, places: Tensor) -> None:
        """Copies `queries [n, Hq, D]` of one layer to `places [n]`."""
        self._buffer(layer, queries).index_copy_(0, places, queries)

    def _buffer(self, layer: int, like: Tensor) -> Tensor:
        """The layer's buffer, made longer where requests have come that it has no room for."""
        buffer = self._buffers[layer]
        needed = (len(self._slots) + len(self._free)) * self.length
        if buffer is None or buffer.shape[0] < needed:
            room = needed if buffer is None else max(needed, buffer.shape[0] * 5 // 4)
            longer = like.new_zeros((room, *like.shape[1:]))
            if buffer is not None:
                longer[: buffer.shape[0]] = buffer
            self._buffers[layer] = buffer = longer
        return buffer

    def last(self, layer: int, request_id: str, end: int, count: int) -> Tensor:
        """The queries of the `count` positions before `end`, `[Hq, count, D]`."""
        buffer = self._buffers[layer]
        assert buffer is not None
        places = torch.tensor(self.places(request_id, end - count, end), device=buffer.device)
        return buffer.index_select(0, places).transpose(0, 1)

    def release(self, request_id: str) -> None:
        """Forgets a request; its place goes to the next one."""
        slot = self._slots.pop(request_id, None)
        if slot is not None:
            self._free.append(slot)

    def __len__(self) -> int:
        return len(self._slots)

    @property
    def nbytes(self) -> int:
        return sum(buffer.nbytes for buffer in self._buffers if buffer is not None)
