"""The KVCrush algorithm on plain tensors: signatures, anchors, grouping, selection, budgets."""

from .anchors import anchor_bits
from .clock import Clock
from .evictor import Evictor, Scored
from .grouping import choose_representatives, signature_order
from .heads import HeadNeeds
from .query_tails import BatchTail, QueryTails
from .selection import Kept, Selection, Tier, check_finite, select
from .shares import Shares, Split, pyramid, split_bytes, split_tokens
from .signatures import hamming, pack, popcount, token_bits, unit_signatures
from .stages import record_stages, stage
from .zones import count_real

__all__ = [
    "BatchTail",
    "Clock",
    "Evictor",
    "HeadNeeds",
    "Kept",
    "QueryTails",
    "Scored",
    "Selection",
    "Shares",
    "Split",
    "Tier",
    "anchor_bits",
    "check_finite",
    "choose_representatives",
    "count_real",
    "hamming",
    "pack",
    "popcount",
    "pyramid",
    "record_stages",
    "select",
    "signature_order",
    "split_bytes",
    "split_tokens",
    "stage",
    "token_bits",
    "unit_signatures",
]
