"""How kept tokens are held: as the model made them, or quantized and projected, tier by tier."""

from .channels import ChannelFormat
from .dense import DenseStorage
from .formats import RAW, WIDTHS, Formats, LayerSizes
from .guard import LastQueries
from .rotation import turn
from .tiered import KeyEnergy, TieredStorage, channel_formats
from .widths import WIDEST
from .workspace import Workspace

__all__ = [
    "RAW",
    "WIDEST",
    "WIDTHS",
    "ChannelFormat",
    "DenseStorage",
    "Formats",
    "KeyEnergy",
    "LastQueries",
    "LayerSizes",
    "TieredStorage",
    "Workspace",
    "channel_formats",
    "turn",
]
