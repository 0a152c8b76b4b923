from __future__ import annotations

from dataclasses import dataclass

from .registry import register
from .snapkv import SnapKV


@register
@dataclass(frozen=True)
class ReadAhead(SnapKV):
    """SnapKV, which also keeps what follows the tokens that the prompt's end attends to (docs/research.md).

    The end of a prompt attends to the beginning of the passage that the answer will copy, so each token gives its score
    to the tokens that follow, too. The last queries are nearest to the answer, and count most. Attention is multiplied
    by the norm of the value. The options are those of `SnapKV`; with `ahead=0`, `half_life=0` and `value_norm=False`
    it is SnapKV.
    """

    name = "readahead"
    paper = "ours, on SnapKV: docs/research.md"

    ahead: int = 16
    half_life: float = 8
    value_norm: bool = True
