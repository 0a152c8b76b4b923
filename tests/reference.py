"""The algorithm written plainly: loops, one row, one head, one token at a time. Slow, and easy to check by eye."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from crushkv.config import CrushConfig
from crushkv.core import Tier


def zones(real: int, budget: int, config: CrushConfig) -> tuple[int, int, int, int]:
    """Sink tokens, recent tokens, contested units, kept units of a row."""
    sink = min(config.sink, real)
    recent = min(config.window, real - sink)
    middle = real - sink - recent
    contested = max(0, min(budget, real) - sink - recent)
    units, rest = divmod(middle, config.page_size)
    taken = min(rest, contested)
    return sink, recent + taken, units, min(units, (contested - taken) // config.page_size)


def best(scores: Sequence[float], count: int) -> set[int]:
    """Positions of the `count` highest; the earlier one where two are equal."""
    return set(sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:count])


def anchor(name: str, signatures: list[list[int]], seed: int) -> list[int]:
    length = len(signatures[0])
    if name in ("mean", "inverse_mean"):
        majority = [int(2 * sum(s[i] for s in signatures) > len(signatures)) for i in range(length)]
        return majority if name == "mean" else [1 - bit for bit in majority]
    if name == "alternating":
        return [i % 2 for i in range(length)]
    if name == "random":
        return (torch.rand(length, generator=torch.Generator().manual_seed(seed)) < 0.5).int().tolist()
    return [int(name == "ones")] * length


def unit_order(
    head_scores: list[list[float]], retained: list[int], units: int, config: CrushConfig, seed: int
) -> list[int]:
    """Units by (distance to the anchor, position)."""
    page = config.page_size
    bits = [best(scores, count) for scores, count in zip(head_scores, retained, strict=True)]
    signatures = [
        [int(unit * page + i in bits[head]) for i in range(page) for head in range(len(bits))] for unit in range(units)
    ]
    compared = anchor(config.anchor, signatures, seed)

    def distance(unit: int) -> int:
        return sum(a != b for a, b in zip(signatures[unit], compared, strict=True))

    return sorted(range(units), key=lambda unit: (distance(unit), unit))


def representatives(order: list[int], candidates: set[int], count: int) -> set[int]:
    listed = [unit for unit in order if unit in candidates]
    chosen = set()
    for bucket in range(count):
        first = math.ceil(bucket * len(listed) / count)
        last = math.ceil((bucket + 1) * len(listed) / count) - 1
        chosen.add(listed[(first + last) // 2])
    return chosen


def share_of(keep: int, config: CrushConfig) -> int:
    """Representatives of each KV head."""
    return math.floor(keep * config.representative_share + 0.5)


def select_row(
    head_score: torch.Tensor,
    kv_heads: int,
    budget: int,
    config: CrushConfig,
    real: list[bool],
    seed: int,
    most_units: int | None = None,
) -> list[dict[int, Tier]]:
    """For one row (`head_score [H, S]`): token -> tier, for each KV head.

    `most_units`: of a row of the batch, where groups are drawn at random; None: as this row has.
    """
    tokens = [t for t in range(head_score.shape[1]) if real[t]]
    heads = head_score.shape[0]
    group = heads // kv_heads
    sink, recent, units, keep = zones(len(tokens), budget, config)
    page = config.page_size
    always = dict.fromkeys(tokens[:sink], Tier.SINK) | dict.fromkeys(tokens[len(tokens) - recent :], Tier.RECENT)
    middle = tokens[sink : sink + units * page]
    scores = head_score[:, middle].double() if middle else torch.zeros(heads, 0).double()

    by_unit = scores.view(kv_heads, group, units, page) if units else scores.view(kv_heads, group, 0, page)
    joined = by_unit.mean(1) if config.aggregate == "mean" else by_unit.amax(1)
    unit_scores = joined.mean(-1).tolist()
    count = share_of(keep, config) if units else 0
    important = [best(unit_scores[h], keep - count) for h in range(kv_heads)]

    chosen: list[set[int]] = [set() for _ in range(kv_heads)]
    if count:
        if config.grouping == "signature":
            order = unit_order(scores.tolist(), [(keep - count) * page] * heads, units, config, seed)
        elif config.grouping == "random":
            drawn = torch.randperm(most_units or units, generator=torch.Generator().manual_seed(seed)).tolist()
            order = [u for u in drawn if u < units]
        else:
            order = list(range(units))
        for h in range(kv_heads):
            if config.grouping == "score":
                rest = [-math.inf if u in important[h] else unit_scores[h][u] for u in range(units)]
                chosen[h] = best(rest, count)
            else:
                chosen[h] = representatives(order, set(range(units)) - important[h], count)

    result = []
    for h in range(kv_heads):
        kept = dict(always)
        for units_of_tier, tier in ((important[h], Tier.IMPORTANT), (chosen[h], Tier.REPRESENTATIVE)):
            kept |= {middle[u * page + i]: tier for u in units_of_tier for i in range(page)}
        result.append(dict(sorted(kept.items())))
    return result


def attention_mass(
    queries: torch.Tensor, keys: torch.Tensor, scaling: float, real: torch.Tensor | None = None
) -> torch.Tensor:
    """Sum over queries of softmax attention, `[B, Hq, S]`, with the whole matrix in memory."""
    rows, heads, count, _ = queries.shape
    repeated = keys.repeat_interleave(heads // keys.shape[1], dim=1)
    logits = queries.double() @ repeated.double().transpose(-1, -2) * scaling
    tokens = keys.shape[2]
    seen = torch.ones(count, tokens).tril(tokens - count).bool().expand(rows, 1, -1, -1)
    if real is not None:
        seen = seen & real[:, None, None]
    weights = logits.masked_fill(~seen, -math.inf).softmax(-1).nan_to_num()
    if real is not None:
        weights = weights * real[:, None, -count:, None]
    return weights.sum(-2)


def quantized(numbers: list[float], bits: int) -> tuple[list[int], float, float]:
    """Codes of one group, and the low end and the width of the span that its cells divide.

    The width is a power of two in eighths, a little more than the numbers take; zero lies at a whole number of 255ths.
    """
    least, most = min(0.0, *numbers), max(0.0, *numbers)
    needed = max(most - least, 2.0**-16) * 255 / 254
    span = 2.0 ** (min(127, max(-128, math.ceil(math.log2(needed) * 8))) / 8)
    spare = span - (most - least)
    low = -min(255, max(0, round((spare / 2 - least) / span * 255))) / 255 * span
    codes = [min(max(math.floor((number - low) * 2**8 / span), 0), 2**8 - 1) >> (8 - bits) for number in numbers]
    return codes, low, span


def dequantized(codes: list[int], low: float, span: float, bits: int) -> list[float]:
    """The middle of each code's cell."""
    return [low + span * (code + 0.5) / 2**bits for code in codes]


def rounded_token(numbers: torch.Tensor, narrowest: int, bits: int, group_size: int) -> torch.Tensor:
    """What `bits` bits say of a token that `narrowest` bits were left of; `group_size` divides its numbers."""
    result = []
    for group in numbers.split(min(group_size, len(numbers))):
        codes, low, span = quantized(group.tolist(), narrowest)
        if bits > narrowest:  # the middle of the narrower cell
            codes = [code << (bits - narrowest) | 1 << (bits - narrowest - 1) for code in codes]
        result += dequantized(codes, low, span, bits)
    return torch.tensor(result)


def rotation_matrix(size: int) -> torch.Tensor:
    """Hadamard's matrix of a power of two, from its definition: the sign counts the bits that both indices share."""
    assert size & (size - 1) == 0
    signs = [[(-1) ** bin(i & j).count("1") for j in range(size)] for i in range(size)]
    return torch.tensor(signs, dtype=torch.float32) / math.sqrt(size)


def turned(x: torch.Tensor, positions: Sequence[int], rope: object, sign: int = 1) -> torch.Tensor:
    """RoPE, or its inverse with `sign=-1`: `x [S, D]`, one token at a time. `rope`: None turns nothing."""
    if rope is None:
        return x.clone()
    partner, frequencies = rope.partner, rope.frequencies  # type: ignore[attr-defined]
    out = []
    for token, position in zip(x, positions, strict=True):
        angle = frequencies * float(position)
        out.append(token * angle.cos() + token[partner] * (sign * angle.sin()))
    return torch.stack(out) if out else x.clone()


def widths(energy: Sequence[float], bits: int) -> list[int]:
    """A width for each channel: the next bit goes where it saves most, at most six to a channel."""
    distortion = (1.0, 0.36338, 0.11885, 0.03744, 0.01154, 0.00350, 0.00104)
    found = [0] * len(energy)
    for _ in range(bits):
        saved = [e * (distortion[w] - distortion[w + 1]) if w < 6 else -1.0 for e, w in zip(energy, found, strict=True)]
        found[saved.index(max(saved))] += 1
    return found


STEPS = (1.0, 1.5958, 0.9957, 0.5860, 0.3352, 0.1881, 0.1041)


def level(y: float, width: int) -> float:
    """The nearest of `2 ** width` levels to a number, in steps of its channel."""
    return min(2**width - 1, max(0, math.floor(y + 2**width / 2))) - (2**width - 1) / 2


SPREADS = (0.7, 1.0, 1.4, 2.0, 2.8, 4.0)


def spread_errors(
    parts: Sequence[tuple[torch.Tensor, Sequence[float], Sequence[int]]], rms: torch.Tensor
) -> torch.Tensor:
    """The logarithm of each channel's weighted squared error with each of `SPREADS`, as parts of its root mean square,
    summed over the formats: `[6, D]`.

    parts: the keys `[P, D]` of each format less their centre, the attention that they receive (-1: no key), and the
        bits of each channel.
    """
    total = torch.zeros(len(SPREADS), len(rms))
    for numbers, attended, widths in parts:
        errors = torch.zeros_like(total)
        there = [i for i, weight in enumerate(attended) if weight >= 0]
        mean = sum(attended[i] for i in there) / len(there)
        for i in there:
            steps = [float(r) * STEPS[width] for r, width in zip(rms, widths, strict=True)]
            z = [float(x) / step for x, step in zip(numbers[i], steps, strict=True)]
            used = [(y * STEPS[width]) ** 2 for y, width in zip(z, widths, strict=True) if width]
            size = math.sqrt(sum(used) / max(1, len(used)))
            for f, factor in enumerate(SPREADS):
                for d, width in enumerate(widths):
                    scale = size * factor
                    off = (level(z[d] / scale, width) * scale - z[d]) * steps[d]
                    errors[f, d] += (attended[i] + 9 * mean) * off**2
        total += errors.clamp(min=1e-30).log()
    return total


def rounded_channels(
    numbers: torch.Tensor, spread: torch.Tensor, widths: Sequence[int], weight: torch.Tensor
) -> torch.Tensor:
    """What channels of so many bits and one scale say of a key `[D]` less its centre."""
    z = (numbers / spread).tolist()
    costs = (weight * spread.square()).tolist()
    used = [z[channel] ** 2 for channel, width in enumerate(widths) if width]
    base = math.log2(max(math.sqrt(sum(used) / max(1, len(used))), 1e-6))
    best: tuple[float, torch.Tensor] | None = None
    for factor in (0.8, 1.0, 1.25, 1.6, 2.2):
        code = min(255, max(0, round((base + math.log2(factor)) * 16) + 128))
        scale, error, values = 2.0 ** ((code - 128) / 16), 0.0, []
        for channel, width in enumerate(widths):
            y = z[channel] / scale
            value = level(y / STEPS[width], width) * STEPS[width]
            error += costs[channel] * (value - y) ** 2 * scale**2
            values.append(value * scale)
        if best is None or error < best[0]:
            best = error, torch.tensor(values) * spread
    assert best is not None
    return best[1]
