"""Which tokens of a prompt each layer and KV head keeps, and which others they stand for: as data, and as a page."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..config import CrushConfig
from ..core import Scored, Tier
from ..core.buckets import stands_for
from ..hf import CacheReport, CrushCache, CrushLayer
from ..hf.head_group import HeadGroup
from ..hf.support import check_prompt
from ..prompts import read_prompt
from .pages import environment
from .token_text import TokenText


@dataclass(frozen=True)
class Inspection:
    """What was kept of one prompt. L compressed layers, S tokens.

    Attributes:
        pieces: S pieces of text, one a token; see `TokenText`.
        layers: L numbers of the compressed layers among all of the model's.
        model_layers: how many these are.
        tiers: uint8 `[L, Hkv, S]`, values of `Tier`, 0 for an evicted token.
        stands_for: int32 `[L, Hkv, S]`, position of the representative of an evicted token (with pages: of its
            page's first token), or -1; see `crushkv.core.buckets.stands_for`.
        report: what the cache held after the prompt.
        config: what it was compressed with.
        description: of the model, for the reader.
        versions: of the packages, for the reader.
    """

    pieces: tuple[str, ...]
    layers: tuple[int, ...]
    model_layers: int
    tiers: Tensor
    stands_for: Tensor
    report: CacheReport
    config: CrushConfig
    description: Mapping[str, Any]
    versions: Mapping[str, Any]

    @property
    def evicted(self) -> int:
        """Tokens that were evicted, summed over layers and KV heads."""
        return int((self.tiers == 0).sum())

    @property
    def representatives(self) -> int:
        """Tokens kept as representatives, summed over layers and KV heads."""
        return int((self.tiers == Tier.REPRESENTATIVE).sum())

    @property
    def notes(self) -> list[str]:
        """Remarks for the reader of the page."""
        notes = []
        if self.report.untouched_rows:
            notes.append(
                f"Nothing was evicted: with a fraction as budget, prompts of fewer than {self.config.min_tokens} "
                "tokens (min_tokens) are left as they are. Every token counts as recent."
            )
        elif not self.evicted:
            always = f"sink + window = {self.config.sink} + {self.config.window}"
            notes.append(
                f"Nothing was evicted: all {len(self.pieces)} tokens of this prompt fit into the budget, or are always "
                f"kept ({always}). Every token counts as recent."
            )
        elif self.config.representative_share and not self.representatives:
            notes.append("The budget has no room for representatives, so none stand for the evicted tokens.")
        if left := self.model_layers - len(self.layers):
            notes.append(
                f"{left} of the model's {self.model_layers} layers have a sliding window. They are not compressed, "
                "and not shown."
            )
        return notes


class _InspectedLayer(CrushLayer):
    """Remembers what its representatives stand for."""

    def reset(self) -> None:
        super().reset()
        self._stand_for: dict[int, Tensor] = {}  # int32 [B, Hkv, S], by group

    def evict_group(self, group: HeadGroup, tokens: Scored, budget: Tensor) -> None:
        number = self.groups.index(group)
        self._stand_for[number] = stands_for(
            tokens.score, group.storage.kv_heads, budget, self.plan.config, tokens.seed
        )
        super().evict_group(group, tokens, budget)

    @property
    def stands_for(self) -> Tensor:
        """int32 `[B, Hkv, S]`; -1 where nothing was evicted."""
        nothing = (
            torch.full((group.storage.rows, group.storage.kv_heads, self.seen), -1, dtype=torch.int32)
            for group in self.groups
        )
        return self.joined([self._stand_for.get(number, none).cpu() for number, none in enumerate(nothing)])


class _InspectedCache(CrushCache):
    layer_class = _InspectedLayer


def inspect_prompt(
    model: PreTrainedModel,
    prompt: TokenText,
    config: CrushConfig,
    prefill_chunk_size: int | None = None,
    conditions: Mapping[str, Any] | None = None,
) -> Inspection:
    """Reads one prompt with a compressed cache and tells what it kept.

    Args:
        prompt: what `tokenize` makes of a text.
        prefill_chunk_size: read the prompt in pieces of this many tokens. None reads it in one pass.
        conditions: `model` and `versions`, to be shown to the reader.

    Raises:
        ConfigError: the prompt is empty or longer than the model's positions, or the budget does not fit the model.
        UnsupportedModelError: the model's cache cannot be compressed.
    """
    check_prompt(prompt.ids.shape[1], model.config)
    cache = _InspectedCache(model, config)
    read_prompt(model, prompt.ids, cache, prefill_chunk_size)
    told = conditions or {}
    crushed = {number: layer for number, layer in enumerate(cache.layers) if isinstance(layer, _InspectedLayer)}
    return Inspection(
        pieces=prompt.pieces,
        layers=tuple(crushed),
        model_layers=len(cache.layers),
        tiers=torch.stack([_tiers(layer) for layer in crushed.values()]),
        stands_for=torch.stack([layer.stands_for[0] for layer in crushed.values()]),
        report=cache.report(),
        config=config,
        description=told.get("model", {"name": model.config._name_or_path or type(model).__name__}),
        versions=told.get("versions", {}),
    )


def _tiers(layer: CrushLayer) -> Tensor:
    """Tier of every token seen, uint8 `[Hkv, S]`."""
    positions, tiers = layer.positions[0].cpu(), layer.tiers[0].cpu()
    # Where a head holds fewer tokens than another, slots are filled up that hold none.
    return tiers.new_zeros((len(tiers), layer.seen)).scatter_reduce(-1, positions, tiers, "amax")


def render(inspection: Inspection) -> str:
    """One HTML page that needs nothing else: styles, script and data are in it."""
    template = environment().get_template("inspect.html.j2")
    return template.render(
        inspection=inspection, report=inspection.report, config=inspection.config.to_dict(), data=_data(inspection)
    )


def _data(inspection: Inspection) -> dict[str, Any]:
    """What the page's script reads, arrays in base64 of little-endian numbers."""
    config = inspection.config
    # What is behind the sink is contested in units, and a representative stands for whole ones: one number a unit.
    starts = inspection.stands_for[..., config.sink :: config.page_size]
    units = torch.where(starts < 0, -1, (starts - config.sink) // config.page_size)
    wide = units.shape[-1] >= 2**16  # the highest number is that of no unit
    return {
        "pieces": inspection.pieces,
        "layers": inspection.layers,
        "heads": inspection.tiers.shape[1],
        "sink": config.sink,
        "page": config.page_size,
        "tiers": base64.b64encode(inspection.tiers.numpy().tobytes()).decode(),
        "wide": wide,
        "buckets": base64.b64encode(units.numpy().astype("<u4" if wide else "<u2").tobytes()).decode(),
    }
