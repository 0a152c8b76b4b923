"""What each KV head of a model needs, and which heads of a layer may share a budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

STEPS = 64
MOST_GROUPS = 2
"""Groups of heads a layer is held in, at most: attention runs once for each of them."""
ALIKE = 0.03
"""Heads are one group where that moves no more than this part of the tokens of a head."""
WEIGHT = 0.5
"""Of what a head needs; the rest of a budget goes to all heads alike. Chosen on two models (docs/heads.md)."""


def levels() -> Tensor:
    """The parts of a head's tokens that a curve of needs is made of, ascending to 1: float64 `[STEPS]`.

    They are denser where they are small, since small budgets are decided there.
    """
    return (torch.arange(1, STEPS + 1, dtype=torch.float64) / STEPS).square()


def curve(scores: Tensor) -> Tensor:
    """The scores of a head's tokens from the best to the worst, one for the tokens between each two levels.

    `[..., STEPS]`, descending, of `scores [..., S]`: the score of the token in the middle.
    """
    tokens = scores.shape[-1]
    middle = levels() - _widths() / 2
    ranks = (middle * tokens).long().clamp(max=tokens - 1)
    return scores.sort(dim=-1, descending=True).values[..., ranks.to(scores.device)]


def _widths() -> Tensor:
    return torch.diff(levels(), prepend=torch.zeros(1, dtype=torch.float64))


@dataclass(frozen=True, eq=False)
class HeadNeeds:
    """Shares of a budget for the heads of all layers, as if their tokens competed for it.

    Attributes:
        curves: `[L, Hkv, STEPS]`, of every head of every compressed layer; see `curve`.
    """

    curves: Tensor
    _before: Tensor = field(init=False)  # float64 [L, Hkv, STEPS]: what better tokens take, in heads
    _groups: dict[tuple[int, int], list[tuple[int, ...]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        best = self.curves.flatten().argsort(descending=True, stable=True)
        widths = _widths().expand_as(self.curves).flatten()
        before = torch.empty_like(widths)
        before[best] = widths[best].cumsum(0) - widths[best]
        object.__setattr__(self, "_before", before.view_as(self.curves))

    @property
    def heads(self) -> int:
        """Of a layer: Hkv."""
        return self.curves.shape[1]

    def parts(self, layer: int, mean: Tensor) -> Tensor:
        """Parts of its tokens that each head of a layer keeps where all heads keep `mean [B]` of theirs: `[B, Hkv]`.

        The mean of the parts over all layers and heads is `mean`.
        """
        mean = mean.double()[:, None]
        left = mean[..., None] * self._before.shape[0] * self.heads - self._before[layer]
        needed = left.clamp(min=0).minimum(_widths()).sum(-1)
        return WEIGHT * needed + (1 - WEIGHT) * mean

    def groups(self, layer: int, mean: float) -> list[tuple[int, ...]]:
        """Heads of a layer that keep about as many tokens, where all heads keep a part `mean` on average."""
        key = layer, round(100 * mean)
        if key not in self._groups:
            self._groups[key] = alike(self.parts(layer, torch.tensor([mean]))[0].tolist())
        return self._groups[key]


def alike(parts: Sequence[float]) -> list[tuple[int, ...]]:
    """The fewest groups of heads whose `parts` are about the same, and the groups, in ascending order."""
    order = sorted(range(len(parts)), key=lambda head: parts[head])
    ordered = [parts[head] for head in order]
    for count in range(1, min(MOST_GROUPS, len(parts)) + 1):
        error, ends = _cut(ordered, count)
        if error <= (ALIKE**2) * len(parts):
            break
    return sorted(tuple(sorted(order[a:b])) for a, b in zip([0, *ends[:-1]], ends, strict=True))


def _cut(ordered: Sequence[float], count: int) -> tuple[float, list[int]]:
    """Cuts ascending numbers into `count` stretches of least squared error: that error, and where they end."""

    def error(start: int, end: int) -> float:
        part = ordered[start:end]
        mean = sum(part) / len(part)
        return sum((x - mean) ** 2 for x in part)

    size = len(ordered)
    best = {end: (error(0, end), [end]) for end in range(1, size + 1)}
    for done in range(2, count + 1):
        best = {
            end: min((best[cut][0] + error(cut, end), [*best[cut][1], end]) for cut in range(done - 1, end))
            for end in range(done, size + 1)
        }
    return best[size]
