"""The last queries of each stream, carried from pass to pass: all streams of a layer in one buffer."""

from __future__ import annotations

from collections.abc import Hashable, Iterable

import torch
from torch import Tensor

from ..storage.buffers import writable

# Single queries are copied so many at a time: a copy takes longer than what it moves.
_TOGETHER = 8


class QueryTails:
    """Rings of `length` queries, one for each stream (a row of a batch, or a request) that is near an eviction.

    The query of position p stands in its stream's ring at p modulo `length`, in every layer. Where the streams of a
    pass are at positions of their own, what is written is worked out once (`places`), and each layer then copies it in
    one operation (`record`).
    """

    def __init__(self, layers: int, length: int) -> None:
        self.length = length
        self._slots: dict[Hashable, int] = {}
        self._free: list[int] = []
        self._buffers: list[Tensor | None] = [None] * layers  # [slots * length, Hq, D]

    def _slot(self, stream: Hashable) -> int:
        slot = self._slots.get(stream)
        if slot is None:
            slot = self._slots[stream] = self._free.pop() if self._free else len(self._slots)
        return slot

    def places(self, stream: Hashable, start: int, end: int) -> list[int]:
        """Where the queries of positions `start` to `end` go; at most `length` of them."""
        first = self._slot(stream) * self.length
        return [first + position % self.length for position in range(start, end)]

    def record(self, layer: int, queries: Tensor, places: Tensor) -> None:
        """Copies `queries [n, Hq, D]` of one layer to `places [n]`."""
        self._buffer(layer, queries).index_copy_(0, places, queries)

    def record_rows(self, layer: int, queries: Tensor, start: int) -> None:
        """Copies `queries [B, Hq, q, D]` of positions `start` to `start + q` to the rings of the first B streams.

        Without indices, for which a GPU would be waited for. At most `length` queries a row.
        """
        rows, heads, count, size = queries.shape
        buffer = self._buffer(layer, queries)[: rows * self.length].view(rows, self.length, heads, size)
        place = start % self.length
        fitting = min(count, self.length - place)
        buffer[:, place : place + fitting] = queries[:, :, :fitting].transpose(1, 2)
        if fitting < count:
            buffer[:, : count - fitting] = queries[:, :, fitting:].transpose(1, 2)

    def _buffer(self, layer: int, like: Tensor) -> Tensor:
        """The layer's buffer, made longer where streams have come that it has no room for."""
        buffer = self._buffers[layer]
        needed = (len(self._slots) + len(self._free)) * self.length
        if buffer is None or buffer.shape[0] < needed:
            room = needed if buffer is None else max(needed, buffer.shape[0] * 5 // 4)
            longer = like.new_zeros((room, *_query_shape(like)))
            if buffer is not None:
                longer[: buffer.shape[0]] = buffer
            self._buffers[layer] = buffer = longer
        elif not writable(buffer):
            self._buffers[layer] = buffer = buffer.clone()
        return buffer

    def last(self, layer: int, streams: Iterable[Hashable], end: int, count: int) -> Tensor:
        """The queries of the `count` positions before `end` of each of B streams, `[B, Hq, count, D]`."""
        buffer = self._buffers[layer]
        assert buffer is not None
        places = [self.places(stream, end - count, end) for stream in streams]
        indices = torch.tensor(places).to(buffer.device, non_blocking=True)
        return buffer.index_select(0, indices.flatten()).view(*indices.shape, *buffer.shape[1:]).transpose(1, 2)

    def release(self, stream: Hashable) -> None:
        """Forgets a stream; its place goes to the next one."""
        slot = self._slots.pop(stream, None)
        if slot is not None:
            self._free.append(slot)

    @property
    def nbytes(self) -> int:
        return sum(buffer.nbytes for buffer in self._buffers if buffer is not None)


def _query_shape(queries: Tensor) -> tuple[int, int]:
    """`(Hq, D)` of `[n, Hq, D]` or `[B, Hq, q, D]`."""
    return queries.shape[1], queries.shape[-1]


class BatchTail:
    """The last `length` queries of one layer, of rows that are all at the same position; and which are real."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.clear()

    def clear(self) -> None:
        self._tails = QueryTails(1, self.length)
        self._waiting = list[Tensor]()  # the last ones, not copied yet
        self._rows = 0
        self._end = 0  # queries that were appended
        self.count = 0  # of these, those that are held
        self.real: Tensor | None = None  # bool [B, count]; None: all are

    @property
    def queries(self) -> Tensor | None:
        """`[B, Hq, count, D]`; None: there are none."""
        self._copy()
        return self._tails.last(0, range(self._rows), self._end, self.count) if self.count else None

    @property
    def nbytes(self) -> int:
        waiting = sum(queries.nbytes for queries in self._waiting)
        return self._tails.nbytes + waiting + (0 if self.real is None else self.real.nbytes)

    def append(self, queries: Tensor, real: Tensor | None) -> None:
        """Adds queries `[B, Hq, q, D]` (`real [B, q]`; None: all are), in the place of the oldest."""
        rows, _, new, _ = queries.shape
        if not self._rows:
            self._rows = rows
            for row in range(rows):
                self._tails.places(row, 0, 0)
        self.real = self._joined_real(real, rows, new, queries.device)
        self._end += new
        # Of a prompt, no more are joined with those that wait than will be held.
        self._waiting.append((queries[:, :, -self.length :] if new > self.length else queries).detach())
        if new > 1 or len(self._waiting) >= min(_TOGETHER, self.length):
            self._copy()
        self.count = min(self.length, self.count + new)
        if self.real is not None:
            self.real = self.real[:, -self.count :]

    def _copy(self) -> None:
        """Copies the queries that wait to the place of the oldest."""
        waiting, self._waiting = self._waiting, []
        if waiting:
            queries = torch.cat(waiting, dim=2) if len(waiting) > 1 else waiting[0]
            queries = queries[:, :, -self.length :]
            self._tails.record_rows(0, queries, self._end - queries.shape[2])

    def joined(self, queries: Tensor, real: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """What is held, and queries behind it, with which of all of them are real; nothing is stored."""
        held = self.queries
        real = self._joined_real(real, queries.shape[0], queries.shape[2], queries.device)
        return (queries if held is None else torch.cat([held, queries], dim=2)), real

    def _joined_real(self, real: Tensor | None, rows: int, new: int, device: torch.device) -> Tensor | None:
        # Flags that flag nothing would be multiplied with every block of attention. Single queries are not asked: on a
        # GPU each answer is waited for.
        if real is not None and self.real is None and new > 1 and bool(real.all()):
            real = None
        if real is None and self.real is None:
            return None
        held = torch.ones((rows, self.count), dtype=torch.bool, device=device) if self.real is None else self.real
        return torch.cat([held, held.new_ones((rows, new)) if real is None else real], dim=1)

    def show(self, real: Tensor) -> None:
        """Says anew which of the queries held are real, bool `[B, count]`: a mask may hide some later."""
        if self.count and not (self.real is None and bool(real.all())):
            self.real = real

    def select_rows(self, rows: Tensor) -> None:
        """Replaces the batch by the given rows of it."""
        queries, real, count = self.queries, self.real, self.count
        self.clear()
        if queries is not None:
            self.append(queries.index_select(0, rows.to(queries.device)), None)
            self.real = None if real is None else real.index_select(0, rows.to(real.device))
            assert self.count == count
