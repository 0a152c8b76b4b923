"""The last queries of a layer, carried from one forward pass to the next."""

from __future__ import annotations

import torch
from torch import Tensor

from ..storage.buffers import writable


class QueryTail:
    """The last queries `[B, Hq, T, D]`, and which of them are real.

    They stand in a buffer of at least twice their number and are moved to its front when its end is reached, so
    that a decoding step copies one query and not all of them.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self._buffer: Tensor | None = None
        self._real: Tensor | None = None  # bool [B, capacity]; None while no padding was seen
        self._start = self._end = 0

    @property
    def count(self) -> int:
        return self._end - self._start

    @property
    def queries(self) -> Tensor | None:
        return None if self._buffer is None else self._buffer[:, :, self._start : self._end]

    @property
    def real(self) -> Tensor | None:
        """Bool `[B, T]`, or None: all are."""
        return None if self._real is None else self._real[:, self._start : self._end]

    @property
    def nbytes(self) -> int:
        return sum(t.untyped_storage().nbytes() for t in (self._buffer, self._real) if t is not None)

    def append(self, queries: Tensor, real: Tensor | None, limit: int | None = None) -> None:
        """Adds queries (`real [B, q]`; None: all are) and keeps the last `limit` of all (None: all)."""
        if limit is not None and queries.shape[2] > limit:
            queries = queries[:, :, -limit:]
            real = None if real is None else real[:, -limit:]
        new = queries.shape[2]
        # Flags that flag nothing would be multiplied with every block of attention. Single queries are not asked: on a
        # GPU each answer is waited for.
        if real is not None and self._real is None and new > 1 and bool(real.all()):
            real = None
        if limit is not None:
            self._start = max(self._start, self._end + new - limit)
        buffer = self._with_room(queries)
        buffer[:, :, self._end : self._end + new] = queries
        if real is not None and self._real is None:
            self._real = torch.ones((buffer.shape[0], buffer.shape[2]), dtype=torch.bool, device=buffer.device)
        if self._real is not None:
            self._real[:, self._end : self._end + new] = True if real is None else real
        self._end += new

    def show(self, real: Tensor) -> None:
        """Says anew which of the queries held are real, bool `[B, T]`: a mask may hide some later."""
        if self._buffer is not None and self.count:
            if self._real is None:
                if bool(real.all()):
                    return
                size = (self._buffer.shape[0], self._buffer.shape[2])
                self._real = torch.ones(size, dtype=torch.bool, device=real.device)
            else:
                self._real = self._real.clone()  # it may have been made under inference_mode
            self._real[:, self._start : self._end] = real

    def _with_room(self, new: Tensor) -> Tensor:
        """The buffer, moved where the new queries would not fit behind the present ones."""
        rows, heads, count, size = new.shape
        if (
            self._buffer is not None
            and self._end + count <= self._buffer.shape[2]
            and writable(self._buffer)
            and (self._real is None or writable(self._real))
        ):
            return self._buffer
        held, queries, real = self.count, self.queries, self.real
        # A prompt's queries fill their buffer; single ones get room for as many again.
        room = held + count if count > 1 and not held else 2 * (held + count)
        buffer = new.new_empty((rows, heads, room, size))
        if queries is not None:
            buffer[:, :, :held] = queries
        if real is not None:
            self._real = torch.ones((rows, room), dtype=torch.bool, device=new.device)
            self._real[:, :held] = real
        self._buffer, self._start, self._end = buffer, 0, held
        return buffer

    def select_rows(self, rows: Tensor) -> None:
        """Replaces the batch by the given rows of it."""
        if self._buffer is not None:
            self._buffer = self._buffer.index_select(0, rows.to(self._buffer.device))
        if self._real is not None:
            self._real = self._real.index_select(0, rows.to(self._real.device))
