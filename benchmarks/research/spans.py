"""Squared error of rounding rotated keys and values, as a share of their energy, by what a token's span is taken from.

python benchmarks/research/spans.py FOLDER      # what record.py wrote; every 20th prompt
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from follower import Prompt
from torch import Tensor

from crushkv.storage.rotation import rotation

BITS = (2, 3, 4, 8)


def spans(x: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Lowest value and span of the cells of each token of `x [..., P, D]`, by name."""
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    most = x.abs().amax(-1, keepdim=True)
    rms = x.square().mean(-1, keepdim=True).sqrt()
    return {
        "lowest to highest (as in the library)": (low, high - low),
        "the same, a tenth shorter": (low + (high - low) / 20, 0.9 * (high - low)),
        "symmetric, to the largest": (-most, 2 * most),
        "symmetric, 2.2 times the rms": (-2.2 * rms, 4.4 * rms),
        "symmetric, 2.8 times the rms": (-2.8 * rms, 5.6 * rms),
    }


def error(x: Tensor, low: Tensor, span: Tensor, bits: int) -> float:
    cells = 2**bits
    codes = ((x - low) / span * cells).floor().clamp(0, cells - 1)
    rounded = low + (codes + 0.5) * span / cells
    return float((rounded - x).square().sum() / x.square().sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path)
    found: dict[str, list[list[float]]] = {}
    for path in sorted(parser.parse_args().folder.glob("*.pt"))[::20]:
        prompt = Prompt.read(path)
        for x in (prompt.keys - prompt.keys.mean(2, keepdim=True), prompt.values):
            turned = (x @ rotation(prompt.size, x.device))[:, :, ::4]
            for name, (low, span) in spans(turned).items():
                found.setdefault(name, []).append([error(turned, low, span, bits) for bits in BITS])
    for name, errors in found.items():
        means = torch.tensor(errors).mean(0)
        print(f"{name:40}", *(f"{bits} bits {mean:.5f}  " for bits, mean in zip(BITS, means.tolist(), strict=True)))


if __name__ == "__main__":
    main()
