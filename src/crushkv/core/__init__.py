"""The KVCrush algorithm on plain tensors: signatures, anchors, grouping, selection, budgets."""

from .anchors import anchor_bits
from .budgets import pyramid
from .grouping import choose_representatives, signature_order
from .seeds import layer_seed
from .selection import Selection, Tier, select
from .signatures import hamming, pack, popcount, token_bits, unit_signatures
from .stages import record_stages, stage

__all__ = [
    "Selection",
    "Tier",
    "anchor_bits",
    "choose_representatives",
    "hamming",
    "layer_seed",
    "pack",
    "popcount",
    "pyramid",
    "record_stages",
    "select",
    "signature_order",
    "stage",
    "token_bits",
    "unit_signatures",
]
