"""What a variant keeps of a recorded prompt, in which bits, and how many bytes that takes."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from follower import Held, Prompt, round_to
from torch import Tensor

from crushkv.core.grouping import (
    candidate_ranks,
    choose_representatives,
    position_order,
    random_order,
    signature_order,
)
from crushkv.core.signatures import unit_signatures

RAW_TOKEN = 256  # bytes of a token's key and value of one KV head, 64 numbers each, in 16 bits


@dataclass(frozen=True)
class Variant:
    """A selection and its formats. Fields that `CrushConfig` has, too, mean the same here.

    Attributes:
        budget: share of the full cache's bytes.
        first, second: bits of keys and of values of the two tiers. share: of the units, that is in the second tier.
        window: recent tokens that are always kept. recent_bits: theirs and the sink's.
        queries: how many of the last queries give the scores. over: their mean, max, mean of square roots (sqrt), or a
            mean in which a query counts half as much as one that is N tokens later (halfN).
        kernel: tokens that a score is the maximum over, centred. ahead: how many more before it, so that what follows a
            token that is looked at counts as much.
        unit_score: of a page: mean, max, or the mean of its best four tokens.
        value: weight of a token's score: none, or the norm of its value.
        scaling: none, or channels of keys scaled by `Prompt.key_scale` before they are rounded.
        ranking: what units are ranked by; see `rank_score`. mix: how much of the others' opinion is in it.
        second_by: how the second tier is chosen: see `second_tier`. pool: from how many times as many of the next best
            units; 0: from all that the first tier leaves. second_page: tokens of its units; 0: as many as of the first.
        layers: none, or how much more the first layer gets than the last (pyramid), as a factor.
        ada: share of a layer's units that heads compete for (AdaKV); 0: each head has the same number.
        summary: kind of tokens that stand for what is evicted, and how many a head (`summaries`).
    """

    budget: float = 0.125
    first: tuple[int, int] = (4, 4)
    second: tuple[int, int] = (2, 2)
    share: float = 0.5
    sink: int = 4
    window: int = 32
    recent_bits: int = 16
    queries: int = 32
    over: str = "mean"
    kernel: int = 7
    ahead: int = 0
    page: int = 16
    aggregate: str = "mean"
    unit_score: str = "mean"
    value: str = "none"
    scaling: str = "none"
    ranking: str = "own"
    mix: float = 0.0
    second_by: str = "score"
    pool: float = 0.0
    second_page: int = 0
    layers: float = 1.0
    ada: float = 0.0
    summary: str = "none"
    summaries: int = 0
    oracle: str = "none"

    def named(self) -> str:
        """The fields that differ from the defaults."""
        plain = Variant()
        changed = [
            (f.name, getattr(self, f.name)) for f in fields(self) if getattr(self, f.name) != getattr(plain, f.name)
        ]
        texts = (f"{name}={'/'.join(map(str, v)) if isinstance(v, tuple) else v}" for name, v in changed)
        return ",".join(texts) or "base"

    @classmethod
    def parse(cls, text: str) -> Variant:
        """What `named` wrote, in any order of fields."""
        plain = cls()
        values: dict[str, Any] = {}
        for part in text.split(",") if text not in ("", "base") else ():
            name, _, value = part.partition("=")
            kind = type(getattr(plain, name))
            values[name] = tuple(map(int, value.split("/"))) if kind is tuple else kind(value)
        return replace(plain, **values)


def token_bytes(bits: tuple[int, int]) -> int:
    """A token's key and value of one KV head with 64 numbers each: codes, and four bytes of limits."""
    return sum(128 if b == 16 else 8 * b + 4 for b in bits)


def token_scores(prompt: Prompt, v: Variant) -> Tensor:
    """SnapKV's scores, `[L, Hq, S]`."""
    weights = prompt.attention(v.queries)
    if v.over == "max":
        mass = weights.amax(2)
    elif v.over.startswith("half"):
        age = torch.arange(v.queries - 1, -1, -1)
        weight = 0.5 ** (age / int(v.over.removeprefix("half")))
        mass = (weights * (weight / weight.sum())[:, None]).sum(2)
    else:
        mass = (weights.sqrt() if v.over == "sqrt" else weights).mean(2)
    if v.value == "norm":
        mass = mass * prompt.values.norm(dim=-1).repeat_interleave(prompt.group, dim=1)
    past = prompt.tokens - v.queries
    if v.kernel > 1:
        sides = (v.kernel // 2 + v.ahead, v.kernel // 2)
        smooth = F.max_pool1d(F.pad(mass[..., :past], sides), v.kernel + v.ahead, stride=1)
        mass = torch.cat([smooth, mass[..., past:]], dim=-1)
    return mass


def of_units(scores: Tensor, v: Variant) -> Tensor:
    """Scores of pages `[..., U]` from those of contested tokens."""
    paged = scores.unflatten(-1, (-1, v.page))
    if v.unit_score == "mean":
        return paged.mean(-1)
    if v.unit_score == "max":
        return paged.amax(-1)
    return paged.topk(min(4, v.page), dim=-1).values.mean(-1)


def votes(by_head: Tensor, retained: int) -> Tensor:
    """Signatures: would a query head, on its own, retain a token? Bool `[L, Hq, M]`."""
    threshold = by_head.topk(retained, dim=-1).values[..., -1:]
    return by_head >= threshold


def normal(score: Tensor) -> Tensor:
    """Shares of the list's sum."""
    return score / score.sum(-1, keepdim=True).clamp(min=1e-12)


def others(kind: str, by_head: Tensor, group: int, retained: int) -> Tensor:
    """How much the other heads want each token, `[L, 1 or Hkv, M]`: counted bits, or shares of attention.

    Kinds: bits or mass, of the layer's heads (layer), of all heads (model), or of those so far (below).
    """
    what, _, whose = kind.partition("_")
    wanted = votes(by_head, retained).float() if what == "bits" else normal(by_head)
    layer = wanted.mean(1, keepdim=True)
    if whose == "layer":
        return layer
    if whose == "model":
        return layer.mean(0, keepdim=True).expand_as(layer)
    if whose == "below":
        return layer.cumsum(0) / torch.arange(1, len(layer) + 1)[:, None, None]
    if whose == "own":
        return wanted.unflatten(1, (-1, group)).mean(2)
    raise ValueError(kind)


def rank_score(by_head: Tensor, v: Variant, group: int, retained: int) -> Tensor:
    """What units are ranked by, `[L, Hkv, U]`."""
    grouped = by_head.unflatten(1, (-1, group))
    own = grouped.mean(2) if v.aggregate == "mean" else grouped.amax(2)
    if v.aggregate == "normal":
        own = normal(grouped).mean(2)
    if v.ranking == "own":
        return of_units(own, v)
    other = others(v.ranking, by_head, group, retained)
    if v.mix == 1:
        return of_units(other.expand_as(own), v) + 1e-6 * of_units(normal(own), v)
    if v.mix < 0:  # added, as shares
        return of_units(normal(own) - v.mix * normal(other), v)
    return of_units(normal(own), v).clamp(min=1e-9) ** (1 - v.mix) * of_units(normal(other), v).clamp(min=1e-9) ** v.mix


def ranks(score: Tensor) -> Tensor:
    """Place of each entry in a descending order."""
    order = score.argsort(dim=-1, descending=True, stable=True)
    places = torch.arange(score.shape[-1]).expand_as(order)
    return torch.empty_like(order).scatter(-1, order, places)


def second_tier(score: Tensor, first: Tensor, count: Tensor, by_head: Tensor, v: Variant, group: int) -> Tensor:
    """The units of the second tier, bool `[L, Hkv, U]`. `count [L, Hkv]`.

    score: the next best. random, position, signature: buckets in that order, the middle of each; with `_best`, the
    best scored of each. bits_layer and the like: those that most other heads want. rare_layer and the like: the next
    best, those before others that few heads have in their first tier.
    """
    if v.second_by == "score":
        return ranks(score.masked_fill(first, -torch.inf)) < count[..., None]
    layers, heads, units = score.shape
    retained = max(1, int(first[0, 0].sum())) * v.page
    kind = v.second_by.removesuffix("_best")
    if kind in ("random", "position", "signature", "median"):
        real = torch.ones(layers, units, dtype=torch.bool)
        if kind == "random":
            order = random_order(units, layers, 0, score.device)
        elif kind == "position":
            order = position_order(units, layers, score.device)
        else:
            many = retained if kind == "signature" else by_head.shape[-1] // 2
            signatures = unit_signatures(votes(by_head, many), v.page)
            order = signature_order(signatures, real, "mean", 0)
        candidates = ~first
        if v.pool:
            near = ranks(score.masked_fill(first, -torch.inf)) < (count * v.pool + 0.5).long()[..., None]
            candidates = candidates & near
        if v.second_by.endswith("_best"):
            return best_of_buckets(order, candidates, count, score)
        return choose_representatives(order, candidates, count)
    if kind.startswith("rare"):
        kept = first.float().mean(1, keepdim=True)  # by how many heads of the layer
        if kind == "rare_model":
            kept = kept.mean(0, keepdim=True)
        elif kind == "rare_below":
            kept = kept.cumsum(0) / torch.arange(1, layers + 1)[:, None, None]
        wanted = normal(score.clamp(min=0)) / (0.05 + kept) ** v.mix
        return ranks(wanted.masked_fill(first, -torch.inf)) < count[..., None]
    wanted = of_units(others(kind, by_head, group, retained).expand(layers, heads, -1), replace(v, unit_score="mean"))
    wanted = wanted + 1e-4 * normal(score)
    return ranks(wanted.masked_fill(first, -torch.inf)) < count[..., None]


def best_of_buckets(order: Tensor, candidates: Tensor, count: Tensor, score: Tensor) -> Tensor:
    """As `choose_representatives`, with the highest-scored unit of each bucket and not its middle.

    Args:
        score: `[L, Hkv, U]`; of equal ones, the first in `order` is taken.
    """
    by_order, candidate, rank, total = candidate_ranks(order, candidates)
    bucket = rank * count[..., None] // total
    # Stable sorts by score and then by bucket leave the best of each bucket first in its run.
    ranked = score.gather(-1, by_order).masked_fill(~candidate, -torch.inf)
    best_first = ranked.argsort(dim=-1, descending=True, stable=True)
    run = torch.where(candidate, bucket, bucket.shape[-1]).gather(-1, best_first)
    run, to_best = run.sort(dim=-1, stable=True)
    starts = torch.ones_like(candidate)
    starts[..., 1:] = run[..., 1:] != run[..., :-1]
    chosen = torch.zeros_like(candidate).scatter(-1, best_first.gather(-1, to_best), starts)
    chosen &= candidate & (count[..., None] > 0)
    return torch.zeros_like(candidates).scatter(-1, by_order, chosen)


def layer_factors(prompt: Prompt, v: Variant) -> Tensor:
    """Shares of the layers, with a mean of 1, `[L]`."""
    most = 2 * v.layers / (1 + v.layers)
    return torch.linspace(most, 2 - most, prompt.layers)


def hold(prompt: Prompt, v: Variant) -> Held:
    """What the variant keeps."""
    tokens, kv_heads = prompt.tokens, prompt.kv_heads
    middle = tokens - v.sink - v.window
    units = middle // v.page
    end = v.sink + units * v.page
    always = tokens - units * v.page
    kept_always = always * token_bytes((v.recent_bits, v.recent_bits))
    fixed = kept_always + 128 + (128 if v.scaling != "none" else 0)
    fixed += v.summaries * (token_bytes(v.first) + 2)
    room = (v.budget * tokens * RAW_TOKEN * layer_factors(prompt, v) - fixed).clamp(min=0)
    mean_bytes = v.page * ((1 - v.share) * token_bytes(v.first) + v.share * token_bytes(v.second))
    total = (room / mean_bytes).long().clamp(max=units)  # [L]
    if v.budget >= 1:
        total = torch.full_like(total, units)
    second = (total * v.share + 0.5).long()

    by_head = token_scores(prompt, v)[..., v.sink : end]
    retained = max(1, int((total - second).float().mean())) * v.page
    score = rank_score(by_head, v, prompt.group, min(retained, units * v.page))
    first_count, second_count = ((t[:, None].expand(-1, kv_heads)) for t in (total - second, second))
    if v.ada:
        wanted = first_count + second_count
        first_count = adaptive(score, first_count, v.ada)
        second_count = adaptive(score, wanted, v.ada) - first_count
    first = ranks(score) < first_count[..., None]
    if v.second_page:
        small = replace(v, page=v.second_page)
        times = v.page // v.second_page
        score = rank_score(by_head, small, prompt.group, min(retained, units * v.page))
        first, second_count, v = first.repeat_interleave(times, dim=-1), second_count * times, small
    other = second_tier(score, first, second_count, by_head, v, prompt.group) if v.share else torch.zeros_like(first)

    tiers = torch.zeros(prompt.layers, kv_heads, tokens, dtype=torch.uint8)
    tiers[..., : v.sink] = tiers[..., end:] = 3
    tiers[..., v.sink : end] = (first + 2 * other).to(torch.uint8).repeat_interleave(v.page, dim=-1)
    pairs = []
    for which, side in (("keys", 0), ("values", 1)):
        raw = v.oracle == "bits"
        x = prompt.rounded(which, 16 if raw else v.recent_bits, v.scaling)
        for number, bits in ((1, v.first), (2, v.second)):
            mask = (tiers == number)[..., None]
            if bool(mask.any()):
                x = torch.where(mask, prompt.rounded(which, 16 if raw else bits[side], v.scaling), x)
        pairs.append(x)
    keys, values = pairs
    bias = torch.zeros(tiers.shape).masked_fill_(tiers == 0, -torch.inf)
    per_head = fixed + v.page * (first.sum(-1) * token_bytes(v.first) + other.sum(-1) * token_bytes(v.second))
    nbytes = float(per_head.sum())
    if v.summary != "none":
        keys, values, bias = with_summaries(prompt, v, tiers == 0, keys, values, bias)
    return Held(keys, values, bias, nbytes / (prompt.layers * kv_heads * tokens * RAW_TOKEN))


def adaptive(score: Tensor, count: Tensor, share: float) -> Tensor:
    """AdaKV's split of a layer's units over its heads: a share goes to the best of all heads, the rest evenly."""
    layers, heads, units = score.shape
    floor = (count * (1 - share)).long()
    guaranteed = ranks(score) < floor[..., None]
    free = normal(score).masked_fill(guaranteed, -torch.inf).flatten(1)
    room = (count.sum(-1) - floor.sum(-1)).clamp(min=0)
    won = (ranks(free) < room[:, None]).view(layers, heads, units)
    return floor + won.sum(-1)


def with_summaries(
    prompt: Prompt, v: Variant, evicted: Tensor, keys: Tensor, values: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Adds tokens that stand for buckets of evicted ones: mean key, mean value, weighted by attention.

    Kinds: mass (a logit bias each, so that the window's queries give the bucket what they gave its tokens), count (the
    bias is the logarithm of how many), none_ (no bias); buckets by position, or `_signature`, `_random`, `_score`.
    """
    kind, _, order_by = v.summary.partition("_")
    layers, kv_heads, tokens = evicted.shape
    weights = prompt.attention(v.queries)  # [L, Hq, T, S]
    mass = weights.mean(2).unflatten(1, (kv_heads, prompt.group)).mean(2)  # [L, Hkv, S]
    place = torch.arange(tokens).expand_as(evicted)
    if order_by == "signature":
        by_head = token_scores(prompt, v)
        bits = votes(by_head, max(1, int(tokens * 0.25)))
        key = bits.sum(1, keepdim=True).expand_as(evicted) * tokens + place
    elif order_by == "score":
        key = ranks(mass)
    elif order_by == "random":
        key = torch.rand(tokens, generator=torch.Generator().manual_seed(0)).argsort().expand_as(evicted)
    else:
        key = place
    rank = ranks(-key.masked_fill(~evicted, 2**40).double())
    bucket = rank * v.summaries // evicted.sum(-1, keepdim=True).clamp(min=1)
    bucket = bucket.clamp(max=v.summaries - 1)
    member = F.one_hot(bucket, v.summaries).float() * evicted[..., None]  # [L, Hkv, S, R]
    share = member * (mass + 1e-9)[..., None]
    share = (share / share.sum(2, keepdim=True).clamp(min=1e-20)).transpose(-1, -2)  # [L, Hkv, R, S]
    key_mean, value_mean = share @ prompt.keys, share @ prompt.values
    key_mean = round_to(key_mean - prompt.keys.mean(2, keepdim=True), v.first[0], False) + prompt.keys.mean(
        2, keepdim=True
    )
    value_mean = round_to(value_mean, v.first[1], False)
    if kind == "mass":
        q = prompt.queries[:, :, -v.queries :].unflatten(1, (kv_heads, prompt.group)).flatten(2, 3)  # [L, Hkv, G T, D]
        logits = q @ prompt.keys.transpose(-1, -2) * prompt.size**-0.5
        normaliser = logits.logsumexp(-1, keepdim=True)
        real = (weights.unflatten(1, (kv_heads, prompt.group)).flatten(2, 3).mean(2)[..., None, :] @ member)[..., 0, :]
        ours = (q @ key_mean.transpose(-1, -2) * prompt.size**-0.5 - normaliser).exp().mean(2)
        extra = (real.clamp(min=1e-12) / ours.clamp(min=1e-12)).log()
    elif kind == "count":
        extra = member.sum(2).clamp(min=1).log()
    else:
        extra = torch.zeros(layers, kv_heads, v.summaries)
    extra = extra.masked_fill(member.sum(2) == 0, -torch.inf)
    return torch.cat([keys, key_mean], 2), torch.cat([values, value_mean], 2), torch.cat([bias, extra], 2)
