"""Tokens of one tier, packed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .basis import Basis
from .buffers import take
from .formats import RAW
from .packing import pack, unpack
from .quantization import Codes, dequantize, narrowed, quantize, widened


@dataclass(frozen=True)
class Coordinates:
    """Tokens on their way from one tier to another: codes, or numbers where a tier is not quantized."""

    values: Codes | Tensor

    @classmethod
    def of(cls, x: Tensor, basis: Basis, positions: Tensor, bits: int, group_size: int) -> Coordinates:
        """What a tensor of `bits` bits will hold of `x [B, Hkv, P, D]` at `positions [B, Hkv, P]`."""
        return cls.of_numbers(basis.coordinates(x, positions), x.dtype, bits, group_size)

    @classmethod
    def of_numbers(cls, numbers: Tensor, dtype: torch.dtype, bits: int, group_size: int) -> Coordinates:
        """The same of coordinates, float32 `[B, Hkv, P, R]`, where the model's dtype is `dtype`."""
        return cls(numbers.to(dtype) if bits == RAW else quantize(numbers, group_size))

    @staticmethod
    def joined(parts: list[Coordinates]) -> Coordinates:
        """One after the other."""
        codes = [part.values for part in parts if isinstance(part.values, Codes)]
        if codes:
            names = ("codes", "zero", "span")
            return Coordinates(Codes(*(torch.cat([getattr(c, name) for c in codes], dim=2) for name in names)))
        return Coordinates(torch.cat([part.values for part in parts if isinstance(part.values, Tensor)], dim=2))

    def gather(self, indices: Tensor) -> Coordinates:
        """The tokens at `indices [B, Hkv, K]`."""
        values = self.values
        return Coordinates(values.gather(indices) if isinstance(values, Codes) else take(values, indices))

    def replaced(self, by: Coordinates, where: Tensor) -> Coordinates:
        """These, but for the tokens of `where [B, Hkv, P]`, which are those of `by`."""
        at = where[..., None]
        if isinstance(self.values, Codes) and isinstance(by.values, Codes):
            names = ("codes", "zero", "span")
            pairs = ((getattr(by.values, name), getattr(self.values, name)) for name in names)
            return Coordinates(Codes(*(torch.where(at, new, old) for new, old in pairs)))
        assert isinstance(self.values, Tensor) and isinstance(by.values, Tensor)
        return Coordinates(torch.where(at, by.values, self.values))


class PackedTensor:
    """Keys or values of a tier, `[B, Hkv, P, R]`, in so many bits.

    tensors: uint8 `planes`, `zero` and `span`; or, with 16 bits, `raw` in the model's dtype.
    """

    def __init__(self, bits: int, tensors: Mapping[str, Tensor]) -> None:
        self.bits = bits
        self.tensors = dict(tensors)
        self.tokens = self.tensors["raw" if bits == RAW else "zero"].shape[2]

    @classmethod
    def of(cls, coordinates: Coordinates, bits: int) -> PackedTensor:
        values = coordinates.values
        if isinstance(values, Tensor):
            return cls(bits, {"raw": values})
        planes = pack(narrowed(values.codes, bits), bits)
        return cls(
            bits, {**{f"plane{i}": plane for i, plane in enumerate(planes)}, "zero": values.zero, "span": values.span}
        )

    @property
    def nbytes(self) -> int:
        return sum(tensor.untyped_storage().nbytes() for tensor in self.tensors.values())

    def _codes(self) -> Tensor:
        planes = tuple(tensor for name, tensor in self.tensors.items() if name.startswith("plane"))
        return unpack(planes, self.bits, self.tokens)

    def coordinates(self) -> Coordinates:
        """What is held, ready to move to another tier."""
        if self.bits == RAW:
            return Coordinates(self.tensors["raw"])
        return Coordinates(Codes(widened(self._codes(), self.bits), self.tensors["zero"], self.tensors["span"]))

    def write(self, out: Tensor) -> None:
        """Writes the numbers that are held to float32 `out [B, Hkv, P, R]`."""
        if self.bits == RAW:
            out.copy_(self.tensors["raw"])
        else:
            dequantize(self._codes(), self.tensors["zero"], self.tensors["span"], self.bits, out)

    def select_rows(self, rows: Tensor) -> None:
        """Replaces the batch by the given rows of it."""
        self.tensors = {name: t.index_select(0, rows.to(t.device)) for name, t in self.tensors.items()}
