from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .attention import view_mass
from .base import LayerView, Policy
from .registry import register


@register
@dataclass(frozen=True)
class H2O(Policy):
    """Heavy hitters: the attention received from all queries so far, exactly (arXiv 2306.14048).

    The mass is accumulated block by block while the prompt is read; S x S weights are never held.
    """

    name = "h2o"
    paper = "H2O: Heavy-Hitter Oracle, arXiv 2306.14048"
    streams = True

    def accumulate(self, view: LayerView) -> Tensor:
        mass = view_mass(view)
        if view.mass is not None:
            mass[..., : view.mass.shape[-1]] += view.mass
        return mass

    def score(self, view: LayerView) -> Tensor:
        assert view.mass is not None
        return view.mass
