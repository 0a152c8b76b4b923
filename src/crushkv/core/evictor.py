"""What is decided about the tokens of one layer, for both engines alike."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from ..config import CrushConfig
from ..importance import GATHERED, LayerView, scores, window_mass
from .selection import Selection, select
from .stages import stage

LOOKED_AT = 8
"""Of the last queries: so many say which tokens are attended to as well as more of them do."""


@dataclass(frozen=True)
class Scored:
    """Tokens of a layer, in the order of the text, and how important they are.

    Attributes:
        score: float32 `[B, H, S]`; see `Policy.score`.
        real: bool `[B, S]`, False for padding. None: all tokens are real.
        seed: of everything drawn at random.
        slots: int64 `[B, Hkv, S]`, where the engine holds each token. None: in the order of the text.
        attended: float32 `[B, H, S]`, see `Evictor.attended`, where it was asked for.
    """

    score: Tensor
    real: Tensor | None
    seed: int
    slots: Tensor | None = None
    attended: Tensor | None = None


class Evictor:
    """Ranks the tokens that a layer holds, and selects those that it keeps.

    An engine holds keys, values, the last queries and attention mass in its own way. It shows them as a `LayerView`,
    and keeps what is selected. So both engines select the same tokens. Nothing is remembered here: one object serves
    all layers and requests.

    Attributes:
        policy: what makes the scores.
        streams: whether the policy is shown every query, to gather attention mass (`gather`).
        tail: how many of the last queries an engine carries from pass to pass. A policy that streams is shown decoded
            queries at each eviction, and before it once so many have come.
    """

    def __init__(self, config: CrushConfig) -> None:
        self.config = config
        self.policy = config.make_policy()
        self.streams = self.policy.streams
        gathered = min(GATHERED, config.interval or GATHERED)
        self.tail = gathered if self.streams else self.policy.queries(config.window)

    def seed(self, layer: int, seen: int) -> int:
        """For `LayerView.seed`: differs between layers and evictions, and only there; the same in both engines."""
        return ((self.config.seed * 1_000_003 + layer) * 1_000_003 + seen) % 2**63

    def gather(self, view: LayerView) -> Tensor:
        """Attention mass `[B, Hq, S]`: what a policy that streams had gathered, and what the view's queries add."""
        with stage("importance"):
            return self.policy.accumulate(view)

    def score(self, view: LayerView) -> Scored:
        """The tokens of a view by importance.

        Raises:
            ScoreError: as `importance.scores`.
        """
        with stage("importance"):
            return Scored(scores(self.policy, view), view.real, view.seed)

    def attended(self, view: LayerView) -> Tensor | None:
        """The attention that tokens receive, float32 `[B, H, S]`: what the policy has gathered, or that of the last
        queries. None: the policy sees no queries.
        """
        if view.mass is not None or view.queries is None:
            return view.mass
        last = slice(-LOOKED_AT, None)
        real = None if view.queries_real is None else view.queries_real[:, last]
        return window_mass(replace(view, queries=view.queries[:, :, last], queries_real=real))

    def select(self, tokens: Scored, kv_heads: int, budget: Tensor) -> Selection:
        """Which tokens each of `kv_heads` heads keeps, where `budget [B]` is the most of each row.

        Raises:
            ScoreError: as `select`.
        """
        with stage("selection"):
            return select(tokens.score, kv_heads, budget, self.config, tokens.real, tokens.seed)
