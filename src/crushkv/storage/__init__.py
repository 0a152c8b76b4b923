"""How kept tokens are held."""

from .dense import DenseStorage

__all__ = ["DenseStorage"]
