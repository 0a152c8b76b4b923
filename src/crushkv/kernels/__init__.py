"""Attention of new tokens over everything that a layer holds: the one door, and what computes behind it.

Nothing heavy is imported here: an implementation is imported when it is first asked for.
"""

from ..compiled import VARIABLE
from .choice import append, attend, attend_together, available, chosen, described, reader

__all__ = ["VARIABLE", "append", "attend", "attend_together", "available", "chosen", "described", "reader"]
