"""Importance policies: which cached tokens matter, judged from queries, keys and values."""

from .attention import attention_mass, attention_with_mass, greatest_attention, window_mass
from .base import GATHERED, LayerView, Policy, kept_mass, scores
from .expected_attention import ExpectedAttention
from .h2o import H2O
from .key_diff import KeyDiff
from .key_norm import KeyNorm
from .pyramidkv import PyramidKV
from .random import Random
from .readahead import ReadAhead
from .registry import check_loads, failed_policies, make_policy, policies, register
from .snapkv import SnapKV
from .streaming_llm import StreamingLLM
from .tova import TOVA

__all__ = [
    "GATHERED",
    "H2O",
    "TOVA",
    "ExpectedAttention",
    "KeyDiff",
    "KeyNorm",
    "LayerView",
    "Policy",
    "PyramidKV",
    "Random",
    "ReadAhead",
    "SnapKV",
    "StreamingLLM",
    "attention_mass",
    "attention_with_mass",
    "check_loads",
    "failed_policies",
    "greatest_attention",
    "kept_mass",
    "make_policy",
    "policies",
    "register",
    "scores",
    "window_mass",
]
