"""The last queries of a layer, carried from one forward pass to the next."""

from __future__ import annotations

import torch
from torch import Tensor


class QueryTail:
    """The last queries `[B, Hq, T, D]`, and which of them are real.

    They stand in a buffer of at least twice their number and are moved to its front when its end is reached, so
    that a decoding step copies one query and not all of them.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self._buffer: Tensor | None = None
        self._real: Tensor | None = None  # bool [B, capacity]
        self._start = self._end = 0

    @property
    def count(self) -> int:
        return self._end - self._start

    @property
    def queries(self) -> Tensor | None:
        return None if self._buffer is None else self._buffer[:, :, self._start : self._end]

    @property
    def real(self) -> Tensor | None:
        """Bool `[B, T]`."""
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
        if limit is not None:
            self._start = max(self._start, self._end + new - limit)
        buffer, flags = self._with_room(queries)
        buffer[:, :, self._end : self._end + new] = queries
        flags[:, self._end : self._end + new] = True if real is None else real
        self._end += new

    def _with_room(self, new: Tensor) -> tuple[Tensor, Tensor]:
        """The buffers, moved where the new queries would not fit behind the present ones."""
        rows, heads, count, size = new.shape
        if self._buffer is not None and self._real is not None:
            # A buffer made under inference_mode cannot be written to outside of it.
            frozen = self._buffer.is_inference() and not torch.is_inference_mode_enabled()
            if self._end + count <= self._buffer.shape[2] and not frozen:
                return self._buffer, self._real
        held, queries, real = self.count, self.queries, self.real
        # A prompt's queries fill their buffer; single ones get room for as many again.
        room = held + count if count > 1 and not held else 2 * (held + count)
        buffer = new.new_empty((rows, heads, room, size))
        flags = torch.ones((rows, room), dtype=torch.bool, device=new.device)
        if queries is not None and real is not None:
            buffer[:, :, :held] = queries
            flags[:, :held] = real
        self._buffer, self._real, self._start, self._end = buffer, flags, 0, held
        return buffer, flags

    def select_rows(self, rows: Tensor) -> None:
        """Replaces the batch by the given rows of it."""
        if self._buffer is not None and self._real is not None:
            self._buffer = self._buffer.index_select(0, rows.to(self._buffer.device))
            self._real = self._real.index_select(0, rows.to(self._real.device))
