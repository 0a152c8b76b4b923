from __future__ import annotations

from dataclasses import dataclass

from .base import check_integer
from .registry import register
from .snapkv import SnapKV


@register
@dataclass(frozen=True)
class PyramidKV(SnapKV):
    """SnapKV's scores with budgets that shrink linearly with depth (arXiv 2406.02069).

    Attributes:
        steepness: the paper's beta: the last layer is left `1 / steepness` of the mean budget.
    """

    name = "pyramidkv"
    paper = "PyramidKV, arXiv 2406.02069"
    layer_budget = "pyramid"

    steepness: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer("steepness", self.steepness)
