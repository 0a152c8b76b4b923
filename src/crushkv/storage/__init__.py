"""How kept tokens are held: as the model made them, or quantized and projected, tier by tier."""

from .dense import DenseStorage
from .formats import RAW, WIDTHS, Formats, LayerSizes
from .rotation import turn
from .tiered import TieredStorage
from .workspace import Workspace

__all__ = ["RAW", "WIDTHS", "DenseStorage", "Formats", "LayerSizes", "TieredStorage", "Workspace", "turn"]
