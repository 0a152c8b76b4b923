"""What all layers of one cache share: the configuration, the budget of each layer, the prompt being read."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field

from torch import Tensor

from ..config import CrushConfig
from ..core import Budget, SelectionOptions, pyramid
from ..importance import Policy


@dataclass
class Plan:
    """Shared by the compressed layers of one cache.

    Attributes:
        layers: number of compressed layers.
        bytes_per_token: keys and values of one token in all of them; known once the first layer has been filled.
        prefill_end: logical length at which the prompt being read ends; None while that is not known, and then
            each forward pass over several tokens is a whole prompt.
    """

    config: CrushConfig
    layers: int
    bytes_per_token: int = 0
    prefill_end: int | None = None
    warned: bool = False
    policy: Policy = field(init=False)
    options: SelectionOptions = field(init=False)
    budget: Budget = field(init=False)

    def __post_init__(self) -> None:
        self.policy = self.config.make_policy()
        self.options = self.config.selection
        self.budget = self.config.parsed_budget

    def layer_budget(self, layer: int, seen: Tensor) -> Tensor:
        """Tokens that compressed layer number `layer` keeps of rows that have seen `seen [B]` real tokens.

        Sink and window are kept in any case. Where a fraction or bytes leave no room for a page besides them, one
        warning says so.
        """
        always = self.config.sink + self.config.window
        tokens = self.budget.tokens(seen, self.bytes_per_token)
        tight = (tokens < seen) & (tokens < always + self.config.page_size)
        if not self.warned and bool(tight.any()):
            self.warned = True
            warnings.warn(
                f"crushkv: budget={self.config.budget!r} of {int(seen[tight].min())} tokens leaves no room for a page "
                f"of {self.config.page_size} besides sink + window = {self.config.sink} + {self.config.window}: only "
                "the first and the last tokens are kept",
                stacklevel=2,
            )
        tokens = tokens.maximum(seen.clamp(max=always))
        if self.policy.layer_budget == "pyramid":
            steepness = self.policy.steepness  # type: ignore[attr-defined]
            tokens = pyramid(tokens, seen, layer, self.layers, always, steepness)
        return tokens
