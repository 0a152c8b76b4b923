"""What quantized tiers cost while decoding: time per output token against the same tokens unquantized.

    python benchmarks/formats.py [--json] [--tokens 4096] [--steps 32] [--repeats 5] [--model ID]

One prompt is read once. Caches that hold all of its tokens, each in another format, then take turns in decoding; the
ratio of a format is the median over the repeats of its time per token to that of the unquantized cache in the same
repeat.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from typing import Any

import torch

from crushkv import CrushConfig
from crushkv.hf import Recording
from subject import load, machine

FORMATS: dict[str, dict[str, Any]] = {
    "unquantized": {},
    "8 bits": {"bits": 8},
    "4 bits": {"bits": 4},
    "3 bits": {"bits": 3},
    "2 bits": {"bits": 2},
    "4 bits, not rotated": {"bits": 4, "rotation": False},
    "rank 32": {"rank": 32},
}


@torch.inference_mode()
def step_time(model: Any, cache: Any, steps: int) -> float:
    """Median seconds of a decoding step."""
    times = []
    token = torch.tensor([[1]], device=model.device)
    for _ in range(steps):
        start = time.perf_counter()
        model(input_ids=token, past_key_values=cache, use_cache=True)
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def measure(model: Any, prompt: torch.Tensor, steps: int, repeats: int) -> dict[str, dict[str, Any]]:
    recording = Recording(model, prompt)
    configs = {name: CrushConfig(budget=1.0, interval=0, **fields) for name, fields in FORMATS.items()}
    times: dict[str, list[float]] = {name: [] for name in configs}
    bytes_fraction = {}
    for repeat in range(repeats):
        for name, config in configs.items():
            cache = recording.branch(config)
            bytes_fraction[name] = cache.report().bytes_fraction  # type: ignore[union-attr]
            times[name].append(step_time(model, cache, steps))
            print(f"{repeat + 1}/{repeats} {name:20} {1000 * times[name][-1]:6.1f} ms", file=sys.stderr)
    result = {}
    for name, measured in times.items():
        ratios = [a / b for a, b in zip(measured, times["unquantized"], strict=True)]
        result[name] = {
            "tpot": statistics.median(measured),
            "tpot_ratio": statistics.median(ratios),
            "tpot_ratio_range": [min(ratios), max(ratios)],
            "bytes_fraction": bytes_fraction[name],
        }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--tokens", type=int, default=4096, help="prompt length")
    parser.add_argument("--steps", type=int, default=32, help="tokens decoded a repeat")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--model", help="Hugging Face id or folder; the embedded model where none is given")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    arguments = parser.parse_args()

    model, prompt = load(arguments.model, arguments.tokens)

    found = measure(model, prompt, arguments.steps, arguments.repeats)
    if arguments.json:
        print(
            json.dumps(
                {"tokens": arguments.tokens, "repeats": arguments.repeats, "formats": found, "machine": machine()}
            )
        )
        return
    print(f"\n{arguments.tokens} tokens, all of them kept")
    for name, row in found.items():
        low, high = row["tpot_ratio_range"]
        print(
            f"{name:20} {row['bytes_fraction']:6.1%} of the bytes, {1000 * row['tpot']:6.1f} ms a token, "
            f"{row['tpot_ratio']:.2f}x ({low:.2f}x to {high:.2f}x)"
        )


if __name__ == "__main__":
    main()
