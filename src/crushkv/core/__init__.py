"""The KVCrush algorithm on plain tensors: signatures, anchors, grouping, selection, budgets."""

from .anchors import anchor_bits
from .clock import Clock
from .grouping import choose_representatives, signature_order
from .heads import HeadNeeds
from .query_tails import BatchTail, QueryTails, tail_length
from .seeds import layer_seed
from .selection import Selection, Tier, select
from .shares import Shares, Split, pyramid, split_bytes, split_tokens
from .signatures import hamming, pack, popcount, token_bits, unit_signatures
from .stages import record_stages, stage

__all__ = [
    "BatchTail",
    "Clock",
    "HeadNeeds",
    "QueryTails",
    "Selection",
    "Shares",
    "Split",
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
    "split_bytes",
    "split_tokens",
    "stage",
    "tail_length",
    "token_bits",
    "unit_signatures",
]
