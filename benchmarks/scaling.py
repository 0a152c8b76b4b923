"""How the selection's time grows with the prompt: one layer's scores in, kept tokens out.

    python benchmarks/scaling.py [--json] [--repeats 15]

Random scores of 9 query heads and 3 KV heads, a quarter kept in pages of 16, a tenth of it representatives. Lengths
take turns; the figure is the median time by that of the shortest length.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import torch

from crushkv import CrushConfig
from crushkv.core import select
from subject import machine

LENGTHS = (8192, 16384, 32768, 65536)
QUERY_HEADS, KV_HEADS = 9, 3


def measure(repeats: int) -> dict[int, float]:
    """Median seconds by length."""
    config = CrushConfig(sink=4, window=32, page_size=16, representative_share=0.1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    scores = {tokens: torch.rand(1, QUERY_HEADS, tokens, device=device) for tokens in LENGTHS}
    times: dict[int, list[float]] = {tokens: [] for tokens in LENGTHS}
    for repeat in range(-2, repeats):
        for tokens, score in scores.items():
            start = time.perf_counter()
            select(score, KV_HEADS, torch.tensor([tokens // 4]), config)
            if device == "cuda":
                torch.cuda.synchronize()
            if repeat >= 0:
                times[tokens].append(time.perf_counter() - start)
    return {tokens: statistics.median(found) for tokens, found in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    arguments = parser.parse_args()
    found = measure(arguments.repeats)
    shortest = found[LENGTHS[0]]
    if arguments.json:
        print(json.dumps({"seconds": found, "machine": machine()}))
        return
    for tokens, seconds in found.items():
        times = tokens // LENGTHS[0]
        print(f"{tokens:6} tokens  {1000 * seconds:7.2f} ms a layer  {seconds / shortest:5.2f}x the time for {times}x")


if __name__ == "__main__":
    main()
