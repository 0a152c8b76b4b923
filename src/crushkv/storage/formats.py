"""In which formats the tiers are held, and how many bytes that takes."""

from __future__ import annotations

from dataclasses import dataclass

from .packing import PLANES, packed_bytes
from .quantization import groups
from .widths import WIDEST, channel_bits

RAW = 16
"""Stands for numbers as the model computes them, whatever their dtype."""
WIDTHS = (RAW, *PLANES)


@dataclass(frozen=True)
class Formats:
    """Formats of the tiers.

    Attributes:
        important, representative: bits of a key's and of a value's numbers, 16 for the model's dtype. Where channels
            have widths of their own, those of a key's are their mean, and need not be whole.
        recent: the same for sink and recent tokens.
        by_channel: each channel of the keys has a width of its own; see `widths`.
        group_size: numbers of a token that share a scale, at most.
        rotation: rotate before quantizing; see `rotation`.
        rank: directions that keys and values are projected onto: their number, or the share of the energy that they
            must cover; None: all.
    """

    important: tuple[float, int] = (RAW, RAW)
    representative: tuple[float, int] = (RAW, RAW)
    recent: tuple[float, int] = (RAW, RAW)
    by_channel: bool = False
    group_size: int = 64
    rotation: bool = True
    rank: int | float | None = None

    @property
    def raw(self) -> bool:
        """Every tier is held as the model made it."""
        return self.rank is None and self.important == self.representative == (RAW, RAW)

    @property
    def contested(self) -> tuple[tuple[float, int], ...]:
        """Bits of keys and values of the contested blocks: of important tokens and representatives, or one of both."""
        if self.raw:
            return ()
        return (self.important,) if self.important == self.representative else (self.important, self.representative)

    @property
    def recent_block(self) -> bool:
        """Whether sink and recent tokens have a block of their own, and are not held as the model made them."""
        return not self.raw and self.recent != (RAW, RAW)

    @property
    def blocks(self) -> tuple[tuple[float, int], ...]:
        """Bits of keys and values of each block."""
        return (*self.contested, self.recent) if self.recent_block else self.contested

    def key_channels(self, bits: float) -> bool:
        """Whether keys of so many bits are held with a width for each channel."""
        return self.by_channel and bits <= WIDEST


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

    def block(self, bits: tuple[float, int], tokens: int) -> int:
        """Keys and values of a tier."""
        keys, values = bits
        return self.kv_heads * (self._keys(keys, tokens) + self._tensor(values, tokens, self.ranks[1]))

    def _keys(self, bits: float, tokens: int) -> int:
        if not self.formats.key_channels(bits):
            return self._tensor(int(bits), tokens, self.ranks[0])
        # Planes are filled up to whole bytes of eight tokens; a token has a scale of one byte.
        return -(-tokens // 8) * channel_bits(bits, self.sizes[0]) + tokens

    def _tensor(self, bits: int, tokens: int, rank: int) -> int:
        if bits == RAW:
            return tokens * rank * self.raw_bytes
        # A byte for the span of a group, and one for where zero lies in it.
        return packed_bytes(tokens, rank, bits) + tokens * groups(rank, self.formats.group_size) * 2

    @property
    def bases(self) -> int:
        """What all tokens of the layer share: the keys' mean and spread, and the directions of a projection."""
        if self.formats.raw:
            return 0
        numbers = self.sizes[0]
        if self.formats.rank is not None:
            numbers += sum(size * rank for size, rank in zip(self.sizes, self.ranks, strict=True))
        spread = self.sizes[0] * 2 if self.formats.by_channel else 0
        return self.kv_heads * (numbers * self.raw_bytes + spread)

    def tiers(self, kept: int, important: int, representative: int) -> int:
        """Everything: `kept` sink and recent tokens, and what is contested."""
        contested = important + representative
        if self.formats.raw or not (contested or self.formats.recent_block):
            return self.raw(kept + contested)
        lengths = (important, representative) if len(self.formats.contested) == 2 else (contested,)
        blocks = sum(self.block(bits, tokens) for bits, tokens in zip(self.formats.contested, lengths, strict=True))
        always = self.block(self.formats.recent, kept) if self.formats.recent_block else self.raw(kept)
        return always + blocks + self.bases
