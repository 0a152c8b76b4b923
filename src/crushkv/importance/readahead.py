from __future__ import annotations

from dataclasses import dataclass

from .registry import register
from .snapkv import SnapKV


@register
@dataclass(frozen=True)
class ReadAhead(SnapKV):
    """SnapKV, aimed at what the answer will read, not only at what the prompt's end looks at (docs/research.md).

    The end of a prompt looks at the beginning of what the answer will copy: the score of that is lent to the tokens
    that follow. The last queries are nearest to the answer, and count most. Attention counts by what it brings, the
    norm of the value. Options as of `SnapKV`; `ahead=0`, `half_life=0` and `value_norm=False` together are SnapKV.
    """

    name = "readahead"
    paper = "ours, on SnapKV: docs/research.md"

    ahead: int = 16
    half_life: float = 8
    value_norm: bool = True
