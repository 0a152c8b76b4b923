"""What an importance policy is: scores for cached tokens, from queries, keys and values."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..errors import ConfigError, ScoreError

_MOST = 10**6


def check_integer(name: str, value: object, odd: bool = False, least: int = 1) -> None:
    """Raises `ConfigError` unless an option is an integer of at least `least` (and odd, where that is asked for).

    Options count tokens, so that none needs more than a million: memory is taken for them.
    """
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole or not least <= value <= _MOST or (odd and value % 2 == 0):  # type: ignore[operator]
        kind = "an odd integer" if odd else "an integer"
        raise ConfigError(f"policy_options: {name}={value!r}: accepted is {kind} of at least {least}, at most {_MOST}")


def check_number(name: str, value: object) -> None:
    """Raises `ConfigError` unless an option is a finite number of at least 0."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        raise ConfigError(f"policy_options: {name}={value!r}: accepted is a number of at least 0")


def check_flag(name: str, value: object) -> None:
    """Raises `ConfigError` unless an option is true or false."""
    if not isinstance(value, bool):
        raise ConfigError(f"policy_options: {name}={value!r}: accepted is true or false")


# Decoded tokens' queries that a streaming policy is shown at a time.
GATHERED = 128


def kept_mass(mass: Tensor, indices: Tensor) -> Tensor:
    """The mass `[B, Hq, S]` of the tokens that each KV head keeps, at `indices [B, Hkv, K]`: `[B, Hq, K]`."""
    return mass.gather(2, indices.repeat_interleave(mass.shape[1] // indices.shape[1], dim=1))


def last_where_hidden(score: Tensor, hidden: Tensor | None) -> Tensor:
    """Scores `[B, H, S]` with those of hidden tokens, `[B, Hkv, S]`, as low as the lowest of their head."""
    if hidden is None:
        return score
    hidden = hidden.repeat_interleave(score.shape[1] // hidden.shape[1], dim=1)
    return torch.where(hidden, score.amin(-1, keepdim=True), score)


@dataclass(frozen=True)
class LayerView:
    """What one layer's cache looks like when its tokens are scored.

    Letters: B rows, Hq query heads, Hkv KV heads, S tokens held, T queries at hand, D head size. Tokens stand in
    the order of the text. The queries are the last T that were seen; T may exceed the window, and then the tokens
    of the earlier ones may have been evicted.
    """

    keys: Tensor  # [B, Hkv, S, D], after RoPE
    values: Tensor  # [B, Hkv, S, Dv]
    queries: Tensor | None  # [B, Hq, T, D], after RoPE
    scaling: float  # of the attention logits
    real: Tensor | None = None  # bool [B, S], False for padding; None: all are real
    queries_real: Tensor | None = None  # bool [B, T], the same for the queries
    mass: Tensor | None = None  # float32 [B, Hq, S]: what `Policy.accumulate` has gathered
    received: Tensor | None = None  # float32 [B, Hq, S]: `attention_mass` of the queries, where the engine has it
    softcap: float | None = None  # of the attention logits, where the model has one
    sinks: Tensor | None = None  # [Hq]: logits in every softmax that belong to no token, where the model has them
    seed: int = 0
    hidden: Tensor | None = None  # bool [B, Hkv, S]: read as real, and hidden by the present mask; None: none is

    @property
    def shown(self) -> Tensor | None:
        """What may be attended to, bool `[B, S]` or `[B, Hkv, S]`; None: everything."""
        if self.hidden is None:
            return self.real
        return ~self.hidden if self.real is None else self.real[:, None] & ~self.hidden


@dataclass(frozen=True)
class Policy(ABC):
    """Scores tokens by importance. Holds options only, no state: one object serves every layer and run.

    A new policy is a frozen dataclass whose fields are its options, registered with
    `crushkv.importance.register` or through the entry point group `crushkv.policies`.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    # Every query is shown to `accumulate`, in order, and its result is carried along.
    streams: ClassVar[bool] = False
    # How a budget is split over the layers.
    layer_budget: ClassVar[Literal["uniform", "pyramid"]] = "uniform"

    def queries(self, window: int) -> int:
        """How many of the last queries `score` reads, given the size of the recent window."""
        return 0

    def accumulate(self, view: LayerView) -> Tensor:
        """Attention mass after the view's queries, `[B, Hq, S]`; `view.mass` holds that before them.

        Called for policies that stream, with each query exactly once.
        """
        raise NotImplementedError

    @abstractmethod
    def score(self, view: LayerView) -> Tensor:
        """Importance, higher is more: float32 `[B, Hq, S]`, or `[B, Hkv, S]` from a policy blind to queries.

        Finite everywhere; what stands at padding is not read.
        """


def scores(policy: Policy, view: LayerView) -> Tensor:
    """What a policy says of every token: float32 `[B, H, S]`, hidden ones last.

    Raises:
        ScoreError: the shape is another one. A policy may be anybody's, and fewer scores would be other tokens'.
    """
    found = policy.score(view)
    rows, _, tokens, _ = view.keys.shape
    if found.ndim != 3 or (found.shape[0], found.shape[2]) != (rows, tokens):
        raise ScoreError(
            f"policy {policy.name!r} gave scores of shape {tuple(found.shape)}: expected [{rows}, heads, {tokens}]"
        )
    return last_where_hidden(found, view.hidden)
