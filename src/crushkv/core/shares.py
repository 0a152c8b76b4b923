"""How many tokens each layer keeps for each KV head, and how many bytes hold them."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from ..budget import Budget
from ..config import CrushConfig
from ..importance import Policy
from ..storage import Formats, LayerSizes
from .heads import HeadNeeds
from .selection import representative_units
from .zones import divide


@dataclass(frozen=True)
class Split:
    """Tokens of one row that a layer keeps for each KV head, by tier, and the bytes that hold them."""

    sink: int
    important: int
    representative: int
    recent: int
    nbytes: int

    @property
    def tokens(self) -> int:
        return self.sink + self.important + self.representative + self.recent


@dataclass(frozen=True)
class Shares:
    """A budget, shared out among so many compressed layers.

    Every engine and every plan asks it how many tokens stay. Counts are of real tokens: padding is none.

    Attributes:
        needs: what each head needs; None: the heads of a layer have equal budgets.
    """

    config: CrushConfig
    layers: int
    needs: HeadNeeds | None = None

    @cached_property
    def budget(self) -> Budget:
        return self.config.parsed_budget

    @cached_property
    def _formats(self) -> Formats:
        return self.config.formats

    @cached_property
    def _untouched_below(self) -> int:
        return self.config.untouched_below

    @cached_property
    def _policy(self) -> Policy:
        return self.config.make_policy()

    @property
    def always(self) -> int:
        """Tokens of sink and window, which are kept in any case."""
        return self.config.sink + self.config.window

    def untouched(self, seen: Tensor) -> Tensor:
        """Which rows have seen too few tokens, `seen [B]`, for a fraction of them: bool `[B]`."""
        return seen < self._untouched_below

    def nothing_to_do(self, held: int, budget: int) -> bool:
        """Whether rows that hold `held` tokens at most stay as they are: all fit, and none has to be quantized."""
        return held <= budget and (self._formats.raw or held <= self.always)

    def tokens(
        self, layer: int, seen: Tensor, held: Tensor, sizes: LayerSizes, heads: Sequence[int] | None = None
    ) -> Tensor:
        """Tokens that KV heads of compressed layer number `layer` keep, `[B]`: sink and window in any case, and all of
        a row that `untouched` names.

        Args:
            seen: `[B]`, tokens that each row has seen.
            held: `[B]`, how many of them are left to choose from.
            sizes: of one row of these heads, a number of the model counted as in the model.
            heads: which they are; None: all of the layer.
        """
        if self._in_tokens:
            mean = self.budget.tokens(seen, int(sizes.raw(1) * self._layers(sizes)))
            budget = self._shaped(mean, seen, layer, self.always)
            if self.needs is not None:
                budget = _by_need(self.needs, budget, seen, layer, heads, self.always)
        else:
            limit, full, sizes = self._bytes(seen, sizes)
            least = sizes.tiers(self.always, 0, 0)
            limit = self._shaped(limit, full, layer, least)
            if self.needs is not None:
                limit = _by_need(self.needs, limit, self._bytes_of_all(seen, sizes), layer, heads, least)
            budget = self._fitting(limit, held, sizes)
        return torch.where(self.untouched(seen), held, budget)

    def groups(self, layer: int, seen: int, sizes: LayerSizes) -> list[tuple[int, ...]]:
        """KV heads of compressed layer number `layer` that keep about as many of `seen` tokens, in groups.

        Args:
            sizes: of one row of all heads of this layer.
        """
        together = [tuple(range(sizes.kv_heads))]
        total = torch.tensor([seen])
        if self.needs is None or bool(self.untouched(total)):
            return together
        if self._in_tokens:
            part = _part(self.budget.tokens(total, sizes.raw(1) * self.layers), total, self.always)
        else:
            mean, _, sizes = self._bytes(total, sizes)
            part = _part(mean, self._bytes_of_all(total, sizes), sizes.tiers(self.always, 0, 0))
        return self.needs.groups(layer, float(part)) if 0 < part < 1 else together

    def _layers(self, sizes: LayerSizes) -> Fraction:
        """How often all layers have as many heads as `sizes` has."""
        heads = sizes.kv_heads if self.needs is None else self.needs.heads
        return Fraction(self.layers * heads, sizes.kv_heads)

    def _bytes_of_all(self, seen: Tensor, sizes: LayerSizes) -> Tensor:
        """What all tokens take in the formats of their tiers: `[B]`."""
        return seen.new_tensor([split_tokens(tokens, tokens, self.config, sizes).nbytes for tokens in seen.tolist()])

    def alike(self, seen: int, bytes_per_token: int) -> int:
        """Tokens that each layer keeps of a sequence, where all keep as many and nothing is quantized.

        Args:
            bytes_per_token: keys and values of one token in all layers.
        """
        total = torch.tensor([seen])
        budget = self.budget.tokens(total, bytes_per_token).maximum(total.clamp(max=self.always))
        return int(torch.where(self.untouched(total), total, budget))

    def tight(self, seen: Tensor, held: Tensor, sizes: LayerSizes) -> Tensor:
        """Which rows' budget has no room for a page besides sink and window, in a layer with a mean share: bool `[B]`.

        The arguments are those of `tokens`.
        """
        if self._in_tokens:
            mean = self.budget.tokens(seen, int(sizes.raw(1) * self._layers(sizes)))
        else:
            limit, _, sizes = self._bytes(seen, sizes)
            mean = self._fitting(limit, held, sizes)
        return (mean < seen) & (mean < self.always + self.config.page_size) & ~self.untouched(seen)

    def warn_where_tight(self, seen: Tensor, held: Tensor, sizes: LayerSizes) -> bool:
        """Warns of the rows that `tight` names, and returns whether there are any."""
        tight = self.tight(seen, held, sizes)
        if not bool(tight.any()):
            return False
        config = self.config
        warnings.warn(
            f"crushkv: budget={config.budget!r} of {int(seen[tight].min())} tokens leaves no room for a page of "
            f"{config.page_size} besides sink + window = {config.sink} + {config.window}: only the first and the last "
            "tokens are kept",
            stacklevel=2,
        )
        return True

    def split(self, layer: int, tokens: int, sizes: LayerSizes) -> Split:
        """What compressed layer number `layer` keeps at the end of a prompt of so many tokens."""
        splits = self._splits(layer, tokens, sizes)
        if len(splits) == 1:
            return splits[0][1]
        each = [split for heads, split in splits for _ in heads]
        sink, important, representative, recent = (
            round(sum(getattr(split, tier) for split in each) / len(each))
            for tier in ("sink", "important", "representative", "recent")
        )
        return Split(sink, important, representative, recent, sum(split.nbytes for _, split in splits))

    def by_head(self, layer: int, tokens: int, sizes: LayerSizes) -> tuple[int, ...]:
        """Tokens that each KV head of a compressed layer keeps at the end of a prompt of so many tokens."""
        kept = {head: split.tokens for heads, split in self._splits(layer, tokens, sizes) for head in heads}
        return tuple(kept[head] for head in range(sizes.kv_heads))

    def _splits(self, layer: int, tokens: int, sizes: LayerSizes) -> list[tuple[tuple[int, ...], Split]]:
        """What each group of KV heads of a layer keeps."""
        return [
            (heads, self._split(layer, tokens, replace(sizes, kv_heads=len(heads)), heads))
            for heads in self.groups(layer, tokens, sizes)
        ]

    def _split(self, layer: int, tokens: int, sizes: LayerSizes, heads: Sequence[int]) -> Split:
        prompt = torch.tensor([tokens])
        budget = int(self.tokens(layer, prompt, prompt, sizes, heads))
        if bool(self.untouched(prompt)) or self.nothing_to_do(tokens, budget):
            # Nothing is evicted or quantized, so nothing is scored either.
            sink = min(tokens, self.config.sink)
            return Split(sink, 0, 0, tokens - sink, sizes.raw(tokens))
        return split_tokens(budget, tokens, self.config, sizes)

    @property
    def _in_tokens(self) -> bool:
        """Whether the budget counts tokens, and not the bytes that the formats of the tiers take."""
        return self._formats.raw or self.budget.kind == "tokens"

    def _bytes(self, seen: Tensor, sizes: LayerSizes) -> tuple[Tensor, Tensor, LayerSizes]:
        """The mean of the layers' bytes, what all tokens would take (`[B]` each), and the sizes behind both."""
        if self.budget.kind == "fraction":
            sizes = replace(sizes, raw_bytes=2)  # of 16 bits a number, whatever the model's dtype
        full = seen * sizes.raw(1)
        if self.budget.kind == "fraction":
            return self.budget.tokens(full, 1), full, sizes
        return full.clamp(max=int(self.budget.amount / self._layers(sizes))), full, sizes

    def _shaped(self, mean: Tensor, most: Tensor, layer: int, least: int) -> Tensor:
        """A layer's part of a budget, in tokens or in bytes, given the mean of the layers and what there is."""
        mean = mean.maximum(most.clamp(max=least))
        if self._policy.layer_budget != "pyramid":
            return mean
        steepness = self._policy.steepness  # type: ignore[attr-defined]
        return pyramid(mean, most, layer, self.layers, least, steepness)

    def _fitting(self, limit: Tensor, held: Tensor, sizes: LayerSizes) -> Tensor:
        """Tokens that fit into `limit [B]` bytes, each tier in its own format."""
        pairs = zip(limit.tolist(), held.tolist(), strict=True)
        return limit.new_tensor([split_bytes(most, left, self.config, sizes).tokens for most, left in pairs])


def _part(mean: Tensor, most: Tensor, least: int) -> Tensor:
    """Where a budget lies between `least` (0) and `most` (1), in tokens or in bytes."""
    return ((mean - least) / (most - least).clamp(min=1)).clamp(0, 1)


def _by_need(
    needs: HeadNeeds, mean: Tensor, most: Tensor, layer: int, heads: Sequence[int] | None, least: int
) -> Tensor:
    """A budget of all heads alike, in tokens or in bytes, as the part of it that some heads of a layer need."""
    part = _part(mean, most, least)
    parts = needs.parts(layer, part)
    own = parts.mean(-1) if heads is None else parts[:, list(heads)].mean(-1)
    return torch.where(part < 1, least + (own * (most - least).clamp(min=1)).long(), mean)


@lru_cache(maxsize=1024)
def split_tokens(budget: int, held: int, config: CrushConfig, sizes: LayerSizes) -> Split:
    """What `core.select` makes of `budget` tokens when a row holds `held` real ones."""
    zones = divide(held, budget, config)
    units = representative_units(zones.keep, config.representative_share)
    sink, recent = zones.sink, zones.recent
    important, representative = (part * config.page_size for part in (zones.keep - units, units))
    # Where nothing is contested yet, nothing is quantized either.
    untouched = held <= config.sink + config.window
    nbytes = sizes.raw(held) if untouched else sizes.tiers(sink + recent, important, representative)
    return Split(sink, important, representative, recent, nbytes)


@lru_cache(maxsize=1024)
def split_bytes(limit: int, held: int, config: CrushConfig, sizes: LayerSizes) -> Split:
    """The most tokens that fit into `limit` bytes; sink and window are kept in any case."""
    fits, above = min(held, config.sink + config.window), held
    while fits < above:  # bytes never shrink when tokens are added
        middle = (fits + above + 1) // 2
        if split_tokens(middle, held, config, sizes).nbytes <= limit:
            fits = middle
        else:
            above = middle - 1
    return split_tokens(fits, held, config, sizes)


def pyramid(tokens: Tensor, seen: Tensor, layer: int, layers: int, least: int, steepness: int) -> Tensor:
    """Budget of one layer when budgets shrink linearly with depth (PyramidKV, arXiv 2406.02069, section 4.2).

    Args:
        tokens: mean budget of the layers, `[B]`.
        seen: tokens seen, `[B]`; no layer can keep more.
        layer, layers: index of this layer, and how many layers share the budget.
        least: what a layer keeps in any case (sink and recent).
        steepness: the paper's beta: the last layer is left a `1 / steepness` share of the mean.

    The sum over the layers is exactly `layers * tokens`: the slope is lowered where the first layer would
    otherwise get more than there is.
    """
    low = (tokens // steepness).clamp(min=least).minimum(tokens)
    high = (2 * tokens - low).minimum(seen)
    low = 2 * tokens - high
    if layers == 1:
        return tokens
    # Linear from high to low. What rounding adds in the upper half it takes away in the mirrored lower half,
    # and a middle layer gets exactly the mean, so that the sum is exact.
    steps = layers - 1
    mirrored = min(layer, steps - layer)
    drop = (high - low) * mirrored // steps
    return high - drop if 2 * layer < steps else low + drop if 2 * layer > steps else tokens
