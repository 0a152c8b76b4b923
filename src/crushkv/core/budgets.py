"""How many tokens a layer keeps: the split of a budget over the layers."""

from __future__ import annotations

from torch import Tensor


def pyramid(tokens: Tensor, seen: Tensor, layer: int, layers: int, least: int, steepness: int) -> Tensor:
    """Budget of one layer when budgets shrink linearly with depth (PyramidKV, arXiv 2406.02069, section 4.2).

    Args:
        tokens: mean budget of the layers, `[B]`.
        seen: tokens seen, `[B]`; no layer can keep more.
        layer, layers: index of this layer, and how many layers share the budget.
        least: what a layer keeps in any case (sink and recent).
        steepness: the paper's beta: the last layer is left a `1 / steepness` share of the mean.

    The sum over the layers is exactly `layers * tokens`: the slope is lowered where the first layer would
    otherwise get more than there is.
    """
    low = (tokens // steepness).clamp(min=least).minimum(tokens)
    high = (2 * tokens - low).minimum(seen)
    low = 2 * tokens - high
    if layers == 1:
        return tokens
    # Linear from high to low. What rounding adds in the upper half it takes away in the mirrored lower half,
    # and a middle layer gets exactly the mean, so that the sum is exact.
    steps = layers - 1
    mirrored = min(layer, steps - layer)
    drop = (high - low) * mirrored // steps
    return high - drop if 2 * layer < steps else low + drop if 2 * layer > steps else tokens
