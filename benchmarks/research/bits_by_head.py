"""Caches whose heads differ in bytes and in formats, for `budgets.py`.

A head has options: how many of its pages it keeps, and in which pair of formats, the first for the better part of them.
An option has bytes, as the library counts them, and an error: the mean over the prompt's last queries of the squared
change of what this KV head's query heads add to the layer's output, behind W_o. A Lagrange multiplier finds the options
that make the sum of errors least at some sum of bytes. The nearest published form is RDKV (arXiv 2605.08317), which
gives bits to single tokens and channels. The library would give a bit more to keys whose logits suffer too much
(`logit_limit`); here it does not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from divisions import PAGE, SINK, WINDOW, Contest, won
from follower import Held
from torch import Tensor
from variants import ranks

from crushkv import CrushConfig
from crushkv.core.evictor import LOOKED_AT
from crushkv.hf import CrushCache
from crushkv.storage import Formats, LayerSizes, TieredStorage

Bits = tuple[float, int]
PRESETS = {0.125: "small", 0.0625: "tiny"}
STEPS = 32  # numbers of pages that a head may keep, denser where they are small


@dataclass(frozen=True)
class Pair:
    """Formats of a head's pages: keys and values of the better part, and of the other, which is a `share` of all."""

    first: Bits
    second: Bits
    share: float

    def second_of(self, counts: Tensor) -> Tensor:
        """How many of the kept pages are in the second format."""
        return (counts * self.share + 0.5).long()


ONE = [Pair(bits, bits, 0.0) for bits in ((4, 3), (3, 2), (2.25, 2), (1.75, 2))]


def of_preset(config: CrushConfig) -> Pair:
    return Pair(config.formats.important, config.formats.representative, config.representative_share)


class Options:
    """What each head may hold of a prompt: bytes `[O]`, errors `[L, Hkv, O]`, pairs and numbers of pages `[O]`.

    pair: the number of the pair of formats.
    """

    def __init__(self, counts: Tensor, nbytes: Tensor, errors: Tensor) -> None:
        self.nbytes, self.errors = nbytes.flatten(), errors.flatten(2)
        self.pair = torch.arange(len(nbytes)).repeat_interleave(len(counts))
        self.counts = counts.repeat(len(nbytes))

    def best(self, limits: Tensor) -> Tensor:
        """The option of least error within the bytes of each head, `limits [L, Hkv]`."""
        return self.errors.masked_fill(self.nbytes > limits[..., None], torch.inf).argmin(-1)

    def together(self, limit: float, allowed: Tensor, weight: Tensor | None = None) -> Tensor:
        """The options of the least sum of errors whose bytes sum up to `limit` at most; `weight [L]` of the errors."""
        errors = self.errors if weight is None else self.errors * weight[:, None, None]
        errors = errors.masked_fill(~allowed, torch.inf)
        low, high, pick = -30.0, 10.0, errors.argmin(-1)  # log10 of what a byte costs
        for _ in range(50):
            middle = (low + high) / 2
            found = (errors + 10**middle * self.nbytes).argmin(-1)
            if float(self.nbytes[found].sum()) <= limit:
                high, pick = middle, found
            else:
                low = middle
        while True:  # what is left goes where a byte saves most
            left = limit - float(self.nbytes[pick].sum())
            saved = errors.gather(-1, pick[..., None]) - errors
            more = self.nbytes - self.nbytes[pick][..., None]
            rate = (saved / more).masked_fill((more <= 0) | (more > left) | (saved <= 0), -torch.inf)
            if not bool((rate > 0).any()):
                return pick
            head, option = divmod(int(rate.argmax()), rate.shape[-1])
            pick.view(-1)[head] = option


class Formatted:
    """A prompt in all formats."""

    def __init__(self, model: Any, contest: Contest) -> None:
        self.contest, self.prompt, self.model = contest, contest.prompt, model
        self.middle = slice(SINK, SINK + contest.units * PAGE)
        self._rounded: dict[tuple[Bits, int], tuple[Tensor, Tensor]] = {}

    def rounded(self, bits: Bits, recent: int) -> tuple[Tensor, Tensor]:
        """All keys and values `[L, Hkv, S, D]` as the library's storage gives them back: the pages in `bits`, and what
        is always kept in `recent` bits."""
        if (bits, recent) in self._rounded:
            return self._rounded[bits, recent]
        prompt, middle = self.prompt, self.middle
        text = torch.arange(prompt.tokens)
        order = torch.cat([text[middle], text[: middle.start], text[middle.stop :]])
        lengths = [middle.stop - middle.start, prompt.tokens - (middle.stop - middle.start), 0]
        config, pairs = CrushConfig(bits=bits, recent_bits=recent), []
        plan = CrushCache(self.model, config).plan
        # The library fits the spread of channels to what is kept; here to all tokens, by the attention they receive.
        attended = prompt.attention(LOOKED_AT).mean(2).unflatten(1, (prompt.kv_heads, -1)).mean(2)[..., order]
        for layer in range(prompt.layers):
            storage = TieredStorage(config.formats)
            storage.append(prompt.keys[layer][None], prompt.values[layer][None])
            storage.fit(None, *plan.key_formats(layer, None, torch.device("cpu")))
            storage.keep(order.expand(1, prompt.kv_heads, -1), lengths, attended[layer][None])
            pairs.append([x[0][:, order.argsort()].clone() for x in storage.read()])
        keys, values = (torch.stack(list(of)) for of in zip(*pairs, strict=True))
        self._rounded[bits, recent] = keys, values
        return keys, values

    def nbytes(self, pair: Pair, recent: int, counts: Tensor) -> Tensor:
        """Bytes of a head with so many pages."""
        formats = Formats(pair.first, pair.second, (recent, recent), by_channel=True)
        sizes = LayerSizes(formats, 1, (self.prompt.size,) * 2, (self.prompt.size,) * 2, 2)
        second = pair.second_of(counts)
        each = zip((counts - second).tolist(), second.tolist(), strict=True)
        return torch.tensor([sizes.tiers(self.contest.always, PAGE * a, PAGE * b) for a, b in each]).double()

    def options(self, pairs: list[Pair], recent: int) -> tuple[Options, Tensor]:
        """All options, and the mean squared norm of each layer's output."""
        levels = torch.linspace(0, 1, STEPS + 1) ** 1.5
        counts = (levels * self.contest.units).round().long().unique()
        errors, norms = zip(
            *(self._errors(layer, pairs, recent, counts) for layer in range(self.prompt.layers)), strict=True
        )
        nbytes = torch.stack([self.nbytes(pair, recent, counts) for pair in pairs])
        return Options(counts, nbytes, torch.stack(errors).double()), torch.stack(norms).double()

    def _errors(self, layer: int, pairs: list[Pair], recent: int, counts: Tensor) -> tuple[Tensor, Tensor]:
        """Errors of a layer's options, `[Hkv, F, N]`, and the mean squared norm of its output."""
        prompt, heads, size = self.prompt, self.prompt.kv_heads, self.prompt.size
        queries = prompt.queries[layer, :, -WINDOW:].reshape(heads, -1, size) * size**-0.5  # [Hkv, G T, D]
        future = torch.full((WINDOW, prompt.tokens), True).triu(prompt.tokens - WINDOW + 1).repeat(prompt.group, 1)
        logits = (queries @ prompt.keys[layer].transpose(-1, -2)).masked_fill(future, -torch.inf)
        shift = logits.amax(-1, keepdim=True)
        exact = logits.softmax(-1) @ prompt.values[layer]
        weight = self.model.model.layers[layer].self_attn.o_proj.weight.float()  # [hidden, Hq D]
        behind = weight.view(len(weight), heads, -1).permute(1, 2, 0)  # [Hkv, G D, hidden]
        norm = (self._joined(exact[:, None]) @ behind[:, None]).sum(0).square().sum(-1).mean()
        gram = (behind @ behind.transpose(-1, -2))[:, None]
        order = ranks(self.contest.scores[layer]).argsort(-1)  # the best page first
        sums = {}
        for bits in {bits for pair in pairs for bits in (pair.first, pair.second)}:
            keys, values = (x[layer] for x in self.rounded(bits, recent))
            mass = ((queries @ keys.transpose(-1, -2)).masked_fill(future, -torch.inf) - shift).exp()
            values = torch.cat([values, torch.ones(heads, prompt.tokens, 1)], -1)  # numerators, and the denominator
            by_page = mass[..., self.middle].unflatten(-1, (self.contest.units, -1)).transpose(1, 2)
            parts = by_page @ values[:, self.middle].unflatten(1, (self.contest.units, -1))  # [Hkv, U, G T, D + 1]
            mass[..., self.middle] = 0
            always = mass @ values
            best = parts.take_along_dim(order[..., None, None], 1).cumsum(1)
            sums[bits] = always, torch.cat([torch.zeros_like(best[:, :1]), best], 1)
        errors = []
        for pair in pairs:
            (always, first), (_, second) = sums[pair.first], sums[pair.second]
            border = counts - pair.second_of(counts)
            total = always[:, None] + first[:, border] + second[:, counts] - second[:, border]
            output = total[..., :-1] / total[..., -1:].clamp(min=1e-30)  # 0 where what is kept has no mass at all
            apart = self._joined(output - exact[:, None])
            errors.append((apart @ gram * apart).sum(-1).mean(-1))
        return torch.stack(errors, 1), norm

    def _joined(self, x: Tensor) -> Tensor:
        """The query heads of each KV head side by side: `[Hkv, N, G T, D]` to `[Hkv, N, T, G D]`."""
        return x.unflatten(2, (self.prompt.group, -1)).transpose(2, 3).flatten(3)

    def held(self, pairs: list[Pair], pair: Tensor, counts: Tensor, recent: int) -> Held:
        """The cache in which each head has one of `pairs` and so many pages, `[L, Hkv]` each."""
        place = ranks(self.contest.scores)
        keys, values = (x.clone() for x in self.rounded(pairs[0].first, recent))
        total = 0.0
        for number, one in enumerate(pairs):
            chosen = pair == number
            total += float(self.nbytes(one, recent, counts[chosen]).sum())
            border = (counts - one.second_of(counts))[..., None]
            for bits, pages in ((one.first, place < border), (one.second, place >= border)):
                where = (pages & chosen[..., None]).repeat_interleave(PAGE, -1)[..., None]
                for to, source in zip((keys, values), self.rounded(bits, recent), strict=True):
                    to[:, :, self.middle] = torch.where(where, source[:, :, self.middle], to[:, :, self.middle])
        bias = torch.zeros(keys.shape[:3]).masked_fill_(~self.contest.tokens(counts), -torch.inf)
        return Held(keys, values, bias, total / (4 * keys.numel()))

    def forms(self, budget: float) -> dict[str, Held]:
        """The caches of all forms that divide `budget` of the bytes at 16 bits a number."""
        config = CrushConfig.preset(PRESETS[budget])
        recent, preset = config.recent_bits, of_preset(config)
        pairs = [preset, *(pair for pair in ONE if pair.first != preset.first or pair.share != preset.share)]
        options, norms = self.options(pairs, recent)
        every = torch.arange(self.contest.units + 1)
        nbytes = torch.stack([self.nbytes(pair, recent, every) for pair in pairs])
        least, most = (float(nbytes[0, end]) for end in (0, -1))
        mean = max(least, budget * self.prompt.tokens * self.prompt.size * 4)
        equal = torch.full(options.errors.shape[:2], mean).double()
        limit = float(equal.sum())
        part = (mean - least) / (most - least)
        needed = self.contest.needed(part)
        prompt, defensive = (
            won(scores, round(part * scores.numel())) / self.contest.units
            for scores in (self.contest.scores, self.contest.defensive)
        )
        tokens_only, any_option = options.pair == 0, torch.full_like(options.pair, True, dtype=torch.bool)
        by_tokens = options.together(limit, tokens_only)
        by_both = options.together(limit, any_option)
        relative = options.together(limit, any_option, 1 / norms)

        def within(limits: Tensor, pair: Tensor) -> Held:
            """As many pages as fit into each head's bytes."""
            counts = (nbytes[pair] <= limits[..., None]).sum(-1).clamp(min=1) - 1
            return self.held(pairs, pair, counts, recent)

        def in_preset(limits: Tensor) -> Held:
            return within(limits, torch.zeros(limits.shape, dtype=torch.long))

        def in_best(limits: Tensor) -> Held:
            return within(limits, options.pair[options.best(limits)])

        def picked(pick: Tensor) -> Held:
            return self.held(pairs, options.pair[pick], options.counts[pick], recent)

        def half(pick: Tensor, other: Tensor) -> Tensor:
            return (options.nbytes[pick] + other) / 2

        def by_parts(parts: Tensor) -> Tensor:
            return least + parts * (most - least)

        profile = by_parts((needed + part) / 2)

        return {
            "equal": in_preset(equal),
            "profile": in_preset(profile),
            "profile, weight 1": in_preset(by_parts(needed)),
            "prompt": in_preset(by_parts(prompt)),
            "profile and prompt": in_preset(by_parts((needed + prompt) / 2)),
            "profile and defensive": in_preset(by_parts((needed + defensive) / 2)),
            "thirds": in_preset(by_parts((needed + prompt + part) / 3)),
            "tokens by error": picked(by_tokens),
            "half tokens by error": in_preset(half(by_tokens, equal)),
            "profile and tokens by error": in_preset(half(by_tokens, profile)),
            "tokens and bits by error": picked(by_both),
            "half tokens and bits by error": in_best(half(by_both, equal)),
            "profile and tokens and bits by error": in_best(half(by_both, profile)),
            "tokens and bits by relative error": picked(relative),
            "equal, bits by error": in_best(equal),
            "profile, bits by error": in_best(profile),
        }
