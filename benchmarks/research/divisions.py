"""How many pages each KV head keeps of a prompt: published ways to divide a budget, and the library's profile."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property

import torch
from follower import Held, Prompt
from scores import Trial
from torch import Tensor
from variants import ranks

from crushkv import CrushConfig
from crushkv.core import HeadNeeds, pyramid
from crushkv.core.heads import WEIGHT
from crushkv.core.selection import _unit_scores
from crushkv.importance import LayerView, PyramidKV
from crushkv.importance.base import Policy

CONFIG = CrushConfig()
SINK, WINDOW, PAGE = CONFIG.sink, CONFIG.window, CONFIG.page_size
FLOOR = 0.2  # of a head's equal share, that AdaKV guarantees (arXiv 2407.11550)
TAU = 1.5, 0.6  # CAKE's temperatures for Qwen2.5-7B-Instruct at 1,024 tokens a layer, in its authors' code


class Contest:
    """The pages of one prompt that the heads contend for.

    Attributes:
        scores: readahead's, `[L, Hkv, U]`.
        units: contested pages of each head, U.
        always: tokens that every head keeps: sink, window, and what is left over of a last page.
    """

    def __init__(self, prompt: Prompt, needs: HeadNeeds) -> None:
        self.prompt, self.needs = prompt, needs
        self.units = (prompt.tokens - SINK - WINDOW) // PAGE
        self.always = prompt.tokens - self.units * PAGE
        self.scores = self.paged(CONFIG.make_policy())

    def paged(self, policy: Policy) -> Tensor:
        """A policy's scores of the pages, pooled as the library does: `[L, Hkv, U]`."""
        prompt, found = self.prompt, []
        for keys, values, queries in zip(prompt.keys, prompt.values, prompt.queries, strict=True):
            view = LayerView(keys[None], values[None], queries[None, :, -WINDOW:], prompt.size**-0.5)
            middle = policy.score(view)[..., SINK : SINK + self.units * PAGE]
            found.append(_unit_scores(middle, prompt.kv_heads, CONFIG)[0])
        return torch.stack(found)

    def needed(self, mean: float) -> Tensor:
        """Parts of its pages that the profile alone would give each head, `[L, Hkv]`, where their mean is `mean`."""
        part = torch.tensor([mean], dtype=torch.float64)
        parts = torch.stack([self.needs.parts(layer, part)[0] for layer in range(self.prompt.layers)])
        return (parts - (1 - WEIGHT) * mean) / WEIGHT

    @cached_property
    def defensive(self) -> Tensor:
        """DefensiveKV's scores (arXiv 2510.13334), pooled like readahead's."""
        return self.paged(Trial(over="max", half_life=0, heads="max", floor=True, weight="none", ahead=0))

    def pyramid(self, mean: int) -> Tensor:
        """Pages of each layer's heads, `[L]`, where budgets shrink with depth (PyramidKV, arXiv 2406.02069)."""
        tokens, layers, least = self.prompt.tokens, self.prompt.layers, self.always
        mean_and_most = torch.tensor([least + mean * PAGE]), torch.tensor([tokens])
        kept = [pyramid(*mean_and_most, layer, layers, least, PyramidKV().steepness) for layer in range(layers)]
        return (torch.cat(kept) - least) / PAGE

    def preferences(self) -> Tensor:
        """CAKE's, `[L]` (arXiv 2503.12491): the entropy of the window's attention to what is before it, summed over
        queries and heads, and its variance over the queries, summed over tokens and heads."""
        weights = self.prompt.attention(WINDOW)[..., :-WINDOW]  # [L, Hq, T, P]
        entropy = -(weights * (weights + 1e-10).log()).sum((1, 2, 3))
        return entropy ** (1 / TAU[0]) * weights.var(2).sum((1, 2)) ** (1 / TAU[1])

    def tokens(self, counts: Tensor) -> Tensor:
        """Which tokens heads keep that keep so many pages, `counts [L, Hkv]`: bool `[L, Hkv, S]`."""
        kept = torch.ones(self.prompt.keys.shape[:3], dtype=torch.bool)
        pages = ranks(self.scores) < counts[..., None]
        kept[..., SINK : SINK + self.units * PAGE] = pages.repeat_interleave(PAGE, -1)
        return kept


def whole(wish: Tensor, total: int, most: int) -> Tensor:
    """Whole numbers from 0 to `most` that are near a wish, and whose sum is `total`."""
    counts = wish.clamp(0, most).floor().long()
    while left := total - int(counts.sum()):
        step = 1 if left > 0 else -1
        closed = counts >= most if left > 0 else counts <= 0
        order = ((wish - counts) * step).masked_fill(closed, -torch.inf).flatten().argsort(descending=True, stable=True)
        counts.view(-1)[order[: min(abs(left), int((~closed).sum()))]] += step
    return counts


def won(scores: Tensor, total: int) -> Tensor:
    """How many of the `total` best pages are each head's, of `scores [..., U]`."""
    *heads, units = scores.shape
    best = scores.flatten().topk(total).indices // units
    return best.bincount(minlength=scores[..., 0].numel()).view(heads)


def won_in_layers(scores: Tensor, totals: Iterable[int]) -> Tensor:
    """AdaKV's: the heads of a layer compete for its pages, but for a floor that each of them gets."""
    counts = []
    for of_layer, total in zip(scores, totals, strict=True):
        floor = int(FLOOR * total / len(of_layer))
        free = of_layer.masked_fill(ranks(of_layer) < floor, -torch.inf)
        counts.append(floor + won(free, total - floor * len(of_layer)))
    return torch.stack(counts)


def divisions(contest: Contest, mean: int) -> dict[str, Tensor]:
    """How many pages each head keeps, `[L, Hkv]`, by form of budgets; `mean` on average."""
    layers, heads, units = contest.scores.shape
    total = layers * heads * mean
    equal = torch.full((layers, heads), mean)
    profile = units * contest.needed(mean / units)
    prompt = won(contest.scores, total)
    attention = won(contest.paged(Trial(weight="none")), total)
    defensive = won(contest.defensive, total)
    preferences = contest.preferences()

    def of_layers(wish: Tensor) -> Tensor:
        return wish.double()[:, None].expand(-1, heads)

    by_layer = whole((profile + mean).sum(1) / 2, total, units * heads)
    wishes = {
        "equal": equal,
        "pyramid": of_layers(contest.pyramid(mean)),
        "cake": of_layers(preferences / preferences.sum() * layers * mean),
        "adakv": won_in_layers(contest.scores, [heads * mean] * layers),
        "prompt": prompt,
        "prompt, attention": attention,
        "defensive": defensive,
        "half prompt": (prompt + equal) / 2,
        "half defensive": (defensive + equal) / 2,
        "profile": (profile + equal) / 2,
        "profile, weight 1": profile,
        "profile, layers": of_layers(by_layer / heads),
        "profile layers, adakv": won_in_layers(contest.scores, by_layer.tolist()),
        "profile and prompt": (profile + prompt) / 2,
        "profile and defensive": (profile + defensive) / 2,
        "thirds": (profile + prompt + equal) / 3,
    }
    return {name: whole(wish.double(), total, units) for name, wish in wishes.items()}


def by_tokens(contest: Contest, budget: float) -> dict[str, Held]:
    """The caches of all forms at a budget of tokens."""
    prompt = contest.prompt
    mean = int(budget * prompt.tokens - contest.always) // PAGE
    if mean <= 0:  # nothing to divide
        return {}
    full = prompt.layers * prompt.kv_heads * prompt.tokens
    found = {}
    for name, counts in divisions(contest, mean).items():
        kept = contest.tokens(counts)
        bias = torch.zeros(kept.shape).masked_fill_(~kept, -torch.inf)
        found[name] = Held(prompt.keys, prompt.values, bias, int(kept.sum()) / full)
    return found
