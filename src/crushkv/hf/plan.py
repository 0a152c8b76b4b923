"""What all layers of one cache share: the configuration, the budget of each layer, the prompt being read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor

from ..config import CrushConfig
from ..core import Clock, Evictor, HeadNeeds, Shares, check_finite
from ..later import Later
from ..machine import resident_memory, return_freed_memory
from ..profile import Profile
from ..rope import Rope
from ..storage import ChannelFormat, Formats, KeyEnergy, LayerSizes, Workspace, channel_formats
from .masks import MaskReader

# Freed blocks of a few megabytes stay in the allocator's reserve, too scattered for activations: how many differs from
# one process to the next. When the process has grown by so much from layer to layer, they are given back to the system.
# The next layers ask for the memory again, page by page, which takes 1 % of the time to read 4,096 tokens.
GROWN_BY = 64 * 2**20


@dataclass
class Plan:
    """Shared by the compressed layers of one cache.

    Attributes:
        layers: number of compressed layers.
        ropes: how the keys of each compressed layer turn; none where nothing is quantized.
        profile: of the model; None: widths of channels are chosen from each prompt.
        latent: the cache holds latents (MLA), from which each layer makes the keys and values that it attends to.
        reads_packed: attention reads what is held from the storage while decoding, and need not receive it from the
            cache. Layers that share keys need it.
        clock: says when tokens are evicted, in logical lengths; it knows where the prompt being read ends.
    """

    config: CrushConfig
    layers: int
    ropes: Sequence[Rope | None] = ()
    profile: Profile | None = None
    latent: bool = False
    reads_packed: bool = True
    warned: bool = False
    clock: Clock = field(init=False)
    evictor: Evictor = field(init=False)
    shares: Shares = field(init=False)
    formats: Formats = field(init=False)
    workspace: Workspace = field(default_factory=Workspace)
    masks: MaskReader = field(default_factory=MaskReader)
    _resident: int | None = None
    _put_off: Callable[[], None] | None = None
    _unchecked: list[Later] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.clock = Clock(self.config.interval)
        self.evictor = Evictor(self.config)
        self.share_out(None)
        self.formats = self.config.formats

    def puts_off(self, device: torch.device) -> bool:
        """Whether a layer that has read a prompt evicts when the next one has attended.

        The host has to wait for what decides on formats. On a GPU, a whole layer is put to the device before that, so
        that it has work in the meantime.
        """
        return device.type != "cpu"

    def put_off(self, evict: Callable[[], None], last: bool) -> None:
        """Evicts of the layer before; of this one when the next has attended, or at once if it is the last."""
        self.catch_up()
        self._put_off = evict
        if last:
            self.catch_up()

    def catch_up(self) -> None:
        """Evicts what was put off."""
        evict, self._put_off = self._put_off, None
        if evict is not None:
            evict()

    def forget(self) -> None:
        """Drops what was put off: the cache is emptied."""
        self._put_off = None

    def evicted(self, device: torch.device) -> None:
        """A layer has given memory back: where the process grows all the same, the system gets it."""
        if device.type != "cpu" or (now := resident_memory()) is None:
            return
        if self._resident is None:
            self._resident = now
        elif now - self._resident > GROWN_BY:
            self._resident = None  # the next layer's activations come on top of what is left
            return_freed_memory()

    def watch(self, finite: Later) -> None:
        """Whether scores are finite, for `look` to ask where a device may still be computing them."""
        if finite.under_way:
            self._unchecked.append(finite)

    def look(self) -> None:
        """Waits for the scores that were not checked yet, when all layers have evicted.

        Raises:
            ScoreError: those of some layer are not finite.
        """
        unchecked, self._unchecked = self._unchecked, []
        for finite in unchecked:
            check_finite(finite)

    def share_out(self, needs: HeadNeeds | None) -> None:
        """Shares the budget out among the heads as they need it; None: equally within each layer."""
        self.shares = Shares(self.config, self.layers, needs)

    @property
    def measures_energy(self) -> bool:
        """Whether the energy of each prompt's queries is needed, for lack of a profile."""
        return self.formats.by_channel and self.profile is None

    def key_formats(
        self, layer: int, heads: Sequence[int] | None, device: torch.device
    ) -> tuple[Rope | None, Sequence[ChannelFormat | None]]:
        """How the keys of some heads (None: all) of a compressed layer turn, and their formats where a profile says
        them."""
        rope = self.ropes[layer] if self.ropes else None
        rope = None if rope is None else rope.to(device)
        if self.profile is None or not self.formats.by_channel:
            return rope, ()
        return rope, _profiled(self.profile, self.formats, layer, None if heads is None else tuple(heads), device)

    def tokens_kept(
        self, layer: int, heads: Sequence[int] | None, seen: Tensor, held: Tensor, sizes: LayerSizes
    ) -> Tensor:
        """`Shares.tokens`; one warning says where there is no room for a page besides sink and window."""
        if layer == 0 and not self.warned:
            self.warned = self.shares.warn_where_tight(seen, held, sizes)
        return self.shares.tokens(layer, seen, held, sizes, heads)


@lru_cache(maxsize=16)
def head_needs(profile: Profile) -> HeadNeeds:
    """What each head needs by a profile; all caches share it."""
    return HeadNeeds(profile.needs)


@lru_cache(maxsize=1024)
def _profiled(
    profile: Profile, formats: Formats, layer: int, heads: tuple[int, ...] | None, device: torch.device
) -> Sequence[ChannelFormat | None]:
    """The formats that a profile gives to the keys of some heads; all caches share them."""
    which = slice(None) if heads is None else list(heads)
    with torch.inference_mode(False):
        return channel_formats(formats, KeyEnergy(profile.keys[layer][which], profile.queries[layer][which]), device)
