"""What all layers of one cache share: the configuration, the budget of each layer, the prompt being read."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..budget import Budget
from ..config import CrushConfig
from ..core import pyramid
from ..importance import Policy
from ..profile import Profile
from ..rope import Rope
from ..split import split_bytes
from ..storage import ChannelFormat, Formats, KeyEnergy, LayerSizes, Workspace, channel_formats
from .masks import MaskReader


@dataclass
class Plan:
    """Shared by the compressed layers of one cache.

    Attributes:
        layers: number of compressed layers.
        ropes: how the keys of each compressed layer turn; none where nothing is quantized.
        profile: of the model; None: widths of channels are chosen from each prompt.
        latent: the cache holds latents (MLA), from which each layer makes the keys and values that it attends to.
        prefill_end: logical length at which the prompt being read ends; None while that is not known, and then
            each forward pass over several tokens is a whole prompt.
    """

    config: CrushConfig
    layers: int
    ropes: Sequence[Rope | None] = ()
    profile: Profile | None = None
    latent: bool = False
    prefill_end: int | None = None
    warned: bool = False
    policy: Policy = field(init=False)
    budget: Budget = field(init=False)
    formats: Formats = field(init=False)
    workspace: Workspace = field(default_factory=Workspace)
    _forms: dict[tuple[int, torch.device], Sequence[ChannelFormat | None]] = field(default_factory=dict)
    masks: MaskReader = field(default_factory=MaskReader)

    def __post_init__(self) -> None:
        self.policy = self.config.make_policy()
        self.budget = self.config.parsed_budget
        self.formats = self.config.formats

    @property
    def measures_energy(self) -> bool:
        """Whether the energy of each prompt's queries is needed, for lack of a profile."""
        return self.formats.by_channel and self.profile is None

    def key_formats(self, layer: int, device: torch.device) -> tuple[Rope | None, Sequence[ChannelFormat | None]]:
        """How the keys of compressed layer number `layer` turn, and their formats where the profile says them."""
        rope = self.ropes[layer] if self.ropes else None
        rope = None if rope is None else rope.to(device)
        if self.profile is None or not self.formats.by_channel:
            return rope, ()
        key = layer, device
        if key not in self._forms:
            energy = KeyEnergy(self.profile.keys[layer].to(device), self.profile.queries[layer].to(device))
            self._forms[key] = channel_formats(self.formats, energy)
        return rope, self._forms[key]

    def layer_budget(self, layer: int, seen: Tensor, held: Tensor, sizes: LayerSizes) -> Tensor:
        """Tokens that compressed layer number `layer` keeps of rows that have seen `seen [B]` real tokens.

        Sink and window are kept in any case, and all of a row that `untouched` names. Where a fraction or bytes leave
        no room for a page besides sink and window, one warning says so.

        Args:
            held: `[B]`, how many of them are left to choose from.
            sizes: of one row of this layer, a number of the model counted as in the model.
        """
        if self.formats.raw or self.budget.kind == "tokens":
            budget = self._layer_tokens(layer, seen, sizes)
        else:
            if self.budget.kind == "fraction":
                sizes = replace(sizes, raw_bytes=2)  # of 16 bits a number, whatever the model's dtype
            budget = self._layer_bytes(layer, seen, held, sizes)
        return torch.where(self.untouched(seen), held, budget)

    def untouched(self, seen: Tensor) -> Tensor:
        """Which rows have seen too few real tokens, `seen [B]`, for a fraction of them: bool `[B]`."""
        return seen < self.config.untouched_below

    def _layer_tokens(self, layer: int, seen: Tensor, sizes: LayerSizes) -> Tensor:
        tokens = self.budget.tokens(seen, sizes.raw(1) * self.layers)
        self._warn_where_tight(tokens, seen)
        return self._shaped(tokens, seen, layer, self._always)

    def _layer_bytes(self, layer: int, seen: Tensor, held: Tensor, sizes: LayerSizes) -> Tensor:
        """Tokens that fit into the layer's bytes, each tier in its own format."""
        full = seen * sizes.raw(1)
        if self.budget.kind == "fraction":
            limit = self.budget.tokens(full, 1)
        else:
            limit = full.clamp(max=int(self.budget.amount) // self.layers)
        self._warn_where_tight(self._fitting(limit, held, sizes), seen)
        return self._fitting(self._shaped(limit, full, layer, sizes.tiers(self._always, 0, 0)), held, sizes)

    def _fitting(self, limit: Tensor, held: Tensor, sizes: LayerSizes) -> Tensor:
        pairs = zip(limit.tolist(), held.tolist(), strict=True)
        return limit.new_tensor([split_bytes(most, left, self.config, sizes).tokens for most, left in pairs])

    @property
    def _always(self) -> int:
        return self.config.sink + self.config.window

    def _shaped(self, mean: Tensor, most: Tensor, layer: int, least: int) -> Tensor:
        """A layer's part of a budget, in tokens or in bytes, given the mean of the layers and what there is."""
        mean = mean.maximum(most.clamp(max=least))
        if self.policy.layer_budget != "pyramid":
            return mean
        steepness = self.policy.steepness  # type: ignore[attr-defined]
        return pyramid(mean, most, layer, self.layers, least, steepness)

    def _warn_where_tight(self, tokens: Tensor, seen: Tensor) -> None:
        tight = (tokens < seen) & (tokens < self._always + self.config.page_size) & ~self.untouched(seen)
        if not self.warned and bool(tight.any()):
            self.warned = True
            warnings.warn(
                f"crushkv: budget={self.config.budget!r} of {int(seen[tight].min())} tokens leaves no room for a page "
                f"of {self.config.page_size} besides sink + window = {self.config.sink} + {self.config.window}: only "
                "the first and the last tokens are kept",
                stacklevel=2,
            )
