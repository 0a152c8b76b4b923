"""In which formats the tiers are held, and how many bytes that takes."""

from __future__ import annotations

from dataclasses import dataclass

from .packing import PLANES, packed_bytes
from .quantization import groups

RAW = 16
"""Stands for numbers as the model computes them, whatever their dtype."""
WIDTHS = (RAW, *PLANES)


@dataclass(frozen=True)
class Formats:
    """Formats of the tiers.

    Attributes:
        important, representative: bits of a key's and of a value's numbers, 16 for the model's dtype.
        recent: the same for sink and recent tokens.
        group_size: numbers of a token that share a scale, at most.
        rotation: rotate before quantizing; see `rotation`.
        rank: directions that keys and values are projected onto: their number, or the share of the energy that they
            must cover; None: all.
    """

    important: tuple[int, int] = (RAW, RAW)
    representative: tuple[int, int] = (RAW, RAW)
    recent: tuple[int, int] = (RAW, RAW)
    group_size: int = 64
    rotation: bool = True
    rank: int | float | None = None

    @property
    def raw(self) -> bool:
        """Every tier is held as the model made it."""
        return self.rank is None and self.important == self.representative == (RAW, RAW)

    @property
    def contested(self) -> tuple[tuple[int, int], ...]:
        """Bits of keys and values of the contested blocks: of important tokens and representatives, or one of both."""
        if self.raw:
            return ()
        return (self.important,) if self.important == self.representative else (self.important, self.representative)

    @property
    def recent_block(self) -> bool:
        """Whether sink and recent tokens have a block of their own, and are not held as the model made them."""
        return not self.raw and self.recent != (RAW, RAW)

    @property
    def blocks(self) -> tuple[tuple[int, int], ...]:
        """Bits of keys and values of each block."""
        return (*self.contested, self.recent) if self.recent_block else self.contested


@dataclass(frozen=True)
class LayerSizes:
    """Bytes of one row of one layer.

    Attributes:
        kv_heads: Hkv.
        sizes: head size of keys and of values.
        ranks: numbers that are held of each.
        raw_bytes: of a number as the model makes it.
    """

    formats: Formats
    kv_heads: int
    sizes: tuple[int, int]
    ranks: tuple[int, int]
    raw_bytes: int

    def raw(self, tokens: int) -> int:
        """Keys and values as the model made them."""
        return tokens * self.kv_heads * sum(self.sizes) * self.raw_bytes

    def block(self, bits: tuple[int, int], tokens: int) -> int:
        """Keys and values of a tier."""
        return self.kv_heads * sum(self._tensor(b, tokens, rank) for b, rank in zip(bits, self.ranks, strict=True))

    def _tensor(self, bits: int, tokens: int, rank: int) -> int:
        if bits == RAW:
            return tokens * rank * self.raw_bytes
        # A float16 for the lowest value of a group and one for its span.
        return packed_bytes(tokens, rank, bits) + tokens * groups(rank, self.formats.group_size) * 4

    @property
    def bases(self) -> int:
        """What all tokens of the layer share: the keys' mean, and the directions of a projection."""
        if self.formats.raw:
            return 0
        numbers = self.sizes[0]
        if self.formats.rank is not None:
            numbers += sum(size * rank for size, rank in zip(self.sizes, self.ranks, strict=True))
        return self.kv_heads * numbers * self.raw_bytes

    def tiers(self, kept: int, important: int, representative: int) -> int:
        """Everything: `kept` sink and recent tokens, and what is contested."""
        contested = important + representative
        if self.formats.raw or not (contested or self.formats.recent_block):
            return self.raw(kept + contested)
        lengths = (important, representative) if len(self.formats.contested) == 2 else (contested,)
        blocks = sum(self.block(bits, tokens) for bits, tokens in zip(self.formats.contested, lengths, strict=True))
        always = self.block(self.formats.recent, kept) if self.formats.recent_block else self.raw(kept)
        return always + blocks + self.bases
