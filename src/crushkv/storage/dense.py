"""Kept tokens in the model's own precision."""

from __future__ import annotations

from torch import Tensor

from .buffers import Pick, no_grad, take, writable


class DenseStorage:
    """Keys and values of one layer, `[B, Hkv, P, D]` each, in buffers with room to grow.

    Holds inference data only: what is stored is detached from autograd.

    Args:
        growth: while decoding, room is made for this many tokens at a time, because growing by one would copy the
            layer for every token.
    """

    def __init__(self, growth: int = 64) -> None:
        self.growth = growth
        self._keys: Tensor | None = None
        self._values: Tensor | None = None
        self.length = 0

    @property
    def keys(self) -> Tensor | None:
        return None if self._keys is None else self._keys[:, :, : self.length]

    @property
    def values(self) -> Tensor | None:
        return None if self._values is None else self._values[:, :, : self.length]

    @property
    def keys_buffer(self) -> Tensor | None:
        """The keys with the room behind them: what tells rows, heads, dtype and device without a view being made."""
        return self._keys

    @property
    def values_buffer(self) -> Tensor | None:
        return self._values

    @property
    def nbytes(self) -> int:
        """Bytes held, room to grow included."""
        return sum(t.untyped_storage().nbytes() for t in (self._keys, self._values) if t is not None)

    @property
    def room_nbytes(self) -> int:
        """The part of `nbytes` that is room to grow: allocated, and not filled yet."""
        used = (t[:, :, : self.length] for t in (self._keys, self._values) if t is not None)
        return self.nbytes - sum(t.numel() * t.element_size() for t in used)

    @no_grad
    def append(self, keys: Tensor, values: Tensor, reserve: int = 0) -> None:
        """Adds tokens at the end, with room for `reserve` more."""
        end = self.length + keys.shape[2]
        self._keys = self._extended(self._keys, keys, end + reserve)
        self._values = self._extended(self._values, values, end + reserve)
        self.length = end

    def takes(self, keys: Tensor, values: Tensor) -> bool:
        """Whether new tokens can be written to the buffers as they are, number by number."""
        held = self._keys
        return (
            held is not None
            and self._fits(held, keys)
            and held.dtype == keys.dtype == values.dtype
            and keys.stride(3) == values.stride(3) == 1
        )

    def _fits(self, buffer: Tensor, new: Tensor) -> bool:
        """Whether there is room for new tokens behind those that are held."""
        return self.length + new.shape[2] <= buffer.shape[2] and writable(buffer)

    def parted(self, pick: Pick) -> DenseStorage:
        """Some heads where they lie: to be kept from, or `copied`."""
        assert self.keys is not None and self.values is not None, "nothing is held"
        part = DenseStorage(self.growth)
        part._keys, part._values, part.length = pick(self.keys, 1), pick(self.values, 1), self.length
        return part

    def copied(self) -> None:
        """Holds its tokens in memory of its own."""
        assert self.keys is not None and self.values is not None, "nothing is held"
        self._keys, self._values = self.keys.clone(), self.values.clone()

    def _extended(self, buffer: Tensor | None, new: Tensor, capacity: int) -> Tensor:
        end = self.length + new.shape[2]
        if buffer is None or not self._fits(buffer, new):
            if new.shape[2] == 1:
                capacity = max(capacity, end + self.growth - 1)
            rows, heads, _, size = new.shape
            grown = new.new_empty((rows, heads, capacity, size))
            if buffer is not None:
                grown[:, :, : self.length] = buffer[:, :, : self.length]
            buffer = grown
        assert buffer is not None
        buffer[:, :, self.length : end] = new
        return buffer

    @no_grad
    def keep(self, indices: Tensor) -> None:
        """Keeps the tokens at `indices [B, Hkv, K]` of each head, in that order, and frees the rest."""
        assert self._keys is not None and self._values is not None
        self._keys, self._values = take(self._keys, indices), take(self._values, indices)
        self.length = indices.shape[2]

    def select_rows(self, rows: Tensor) -> None:
        """Replaces the batch by the given rows of it, which may repeat."""
        if self._keys is not None and self._values is not None:
            self._keys = self._keys.index_select(0, rows.to(self._keys.device))
            self._values = self._values.index_select(0, rows.to(self._values.device))

    def clear(self) -> None:
        self._keys = self._values = None
        self.length = 0
