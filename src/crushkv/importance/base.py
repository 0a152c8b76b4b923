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

    Options count tokens that memory is allocated for. So none may be above a million.
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
    """Gathers from `mass [B, Hq, S]` the tokens that each KV head keeps, `indices [B, Hkv, K]`: `[B, Hq, K]`."""
    return mass.gather(2, indices.repeat_interleave(mass.shape[1] // indices.shape[1], dim=1))


def last_where_hidden(score: Tensor, hidden: Tensor | None) -> Tensor:
    """Scores `[B, H, S]`, in which hidden tokens (bool `[B, Hkv, S]`) get the lowest score of their head."""
    if hidden is None:
        return score
    hidden = hidden.repeat_interleave(score.shape[1] // hidden.shape[1], dim=1)
    return torch.where(hidden, score.amin(-1, keepdim=True), score)


@dataclass(frozen=True)
class LayerView:
    """What one layer's cache looks like when its tokens are scored.

    Letters: B rows, Hq query heads, Hkv KV heads, S tokens held, T queries at hand, D head size. Tokens stand in
    the order of the text. The queries are the last T that were seen. T may exceed the window; then some tokens of the
    earlier queries may have been evicted.

    Attributes:
        keys: `[B, Hkv, S, D]`, after RoPE.
        values: `[B, Hkv, S, Dv]`.
        queries: `[B, Hq, T, D]`, after RoPE.
        scaling: factor of the attention logits.
        real: bool `[B, S]`, False for padding. None: all tokens are real.
        queries_real: bool `[B, T]`, the same for the queries.
        mass: float32 `[B, Hq, S]`, what `Policy.accumulate` has gathered.
        received: float32 `[B, Hq, S]`, `attention_mass` of the queries, if the engine has it.
        softcap: of the attention logits, if the model has one.
        sinks: `[Hq]`, logits in every softmax that belong to no token, if the model has them.
        seed: of everything drawn at random.
        hidden: bool `[B, Hkv, S]`, tokens that were read as real and that the present mask hides. None: there are none.
    """

    keys: Tensor
    values: Tensor
    queries: Tensor | None
    scaling: float
    real: Tensor | None = None
    queries_real: Tensor | None = None
    mass: Tensor | None = None
    received: Tensor | None = None
    softcap: float | None = None
    sinks: Tensor | None = None
    seed: int = 0
    hidden: Tensor | None = None

    @property
    def shown(self) -> Tensor | None:
        """Which tokens may be attended to, bool `[B, S]` or `[B, Hkv, S]`. None: all of them."""
        if self.hidden is None:
            return self.real
        return ~self.hidden if self.real is None else self.real[:, None] & ~self.hidden


@dataclass(frozen=True)
class Policy(ABC):
    """Scores tokens by importance. It holds options and no state: one object serves every layer and run.

    A new policy is a frozen dataclass whose fields are its options. Register it with `crushkv.importance.register`, or
    through the entry point group `crushkv.policies`.

    Attributes:
        name: as users write it.
        paper: where it was published, or `"none"`.
        streams: whether `accumulate` is shown every query, in order.
        layer_budget: how a budget is split over the layers.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    streams: ClassVar[bool] = False
    layer_budget: ClassVar[Literal["uniform", "pyramid"]] = "uniform"

    def queries(self, window: int) -> int:
        """How many of the last queries `score` reads, given the size of the recent window."""
        return 0

    def accumulate(self, view: LayerView) -> Tensor:
        """Adds the attention of the view's queries to `view.mass`, and returns the sum, `[B, Hq, S]`.

        Policies that stream are called with each query exactly once.
        """
        raise NotImplementedError

    @abstractmethod
    def score(self, view: LayerView) -> Tensor:
        """Importance of each token: float32 `[B, Hq, S]`, or `[B, Hkv, S]` if the policy looks at no query.

        A higher score is more important. All scores are finite. The scores of padding are not read.
        """


def scores(policy: Policy, view: LayerView) -> Tensor:
    """The policy's scores, float32 `[B, H, S]`, with hidden tokens last.

    Raises:
        ScoreError: the policy gave scores of another shape. Anybody may have written it.
    """
    found = policy.score(view)
    rows, _, tokens, _ = view.keys.shape
    if found.ndim != 3 or (found.shape[0], found.shape[2]) != (rows, tokens):
        raise ScoreError(
            f"policy {policy.name!r} gave scores of shape {tuple(found.shape)}: expected [{rows}, heads, {tokens}]"
        )
    return last_where_hidden(found, view.hidden)
