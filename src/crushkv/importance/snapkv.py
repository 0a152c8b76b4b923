from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ConfigError
from .attention import window_mass
from .base import LayerView, Policy, check_flag, check_integer, check_number
from .registry import register


@register
@dataclass(frozen=True)
class SnapKV(Policy):
    """Attention from the last queries, smoothed along positions (arXiv 2404.14469).

    Attributes:
        kernel: odd width of the smoothing over positions; 1 is none.
        pooling: `max` or `avg`.
        ahead: a token gives its score to so many tokens that follow, too, because they will be read next. Not in the
            paper. 0: to none.
        half_life: a query counts half as much as one that comes so many tokens later. Not in the paper. 0: all count
            the same, as there.
        value_norm: multiply attention by the Euclidean norm of the token's value, because the token adds their product
            to the output (arXiv 2406.12335 takes the sum of the magnitudes).
    """

    name = "snapkv"
    paper = "SnapKV, arXiv 2404.14469"

    kernel: int = 7
    pooling: Literal["max", "avg"] = "max"
    ahead: int = 0
    half_life: float = 0
    value_norm: bool = False

    def __post_init__(self) -> None:
        check_integer("kernel", self.kernel, odd=True)
        check_integer("ahead", self.ahead, least=0)
        check_number("half_life", self.half_life)
        check_flag("value_norm", self.value_norm)
        if self.pooling not in ("max", "avg"):
            raise ConfigError(f"policy_options: pooling={self.pooling!r}: accepted is 'max' or 'avg'")

    def queries(self, window: int) -> int:
        return window

    def score(self, view: LayerView) -> Tensor:
        assert view.queries is not None
        mass = window_mass(view, self.half_life)
        if self.value_norm:
            norm = torch.linalg.vector_norm(view.values, dim=-1, dtype=torch.float32)
            mass = mass * norm.repeat_interleave(mass.shape[1] // norm.shape[1], dim=1)
        # The window's own tokens are kept anyway: their mass must not leak into their neighbours.
        past = view.keys.shape[2] - view.queries.shape[2]
        width = self.kernel + self.ahead
        if width > 1 and past:
            pool = F.max_pool1d if self.pooling == "max" else F.avg_pool1d
            beside = self.kernel // 2
            # Mass is never negative, so that zeros beyond the ends do not change a maximum.
            mass[..., :past] = pool(F.pad(mass[..., :past], (beside + self.ahead, beside)), width, stride=1)
        return mass
