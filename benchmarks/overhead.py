"""What KVCrush itself costs: its share of the latency of a whole request, stage by stage.

    python benchmarks/overhead.py [--json] [--tokens 4096] [--new 128] [--repeats 5] [--model ID]

Three ways of answering the same prompt take turns in one process: the full cache, importance-only eviction, and
KVCrush at the same budget. What KVCrush adds is the time of its eviction (signatures, distances, grouping,
selection, gather) less that of importance-only eviction; ratios are medians over the repeats.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from crushkv import CrushConfig, KVCrush
from crushkv.core import record_stages
from crushkv.timing import OWN_STAGES, rotated
from subject import load, machine

EVICTION = ("selection", "gather")  # `selection` contains the own stages


@dataclass(frozen=True)
class Run:
    """One request: seconds to the first token, seconds per further token, seconds per stage."""

    ttft: float
    tpot: float
    total: float
    stages: dict[str, float]


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@torch.inference_mode()
def request(model: Any, prompt: Tensor, new_tokens: int, config: CrushConfig | None) -> Run:
    cache: Any = DynamicCache(config=model.config) if config is None else KVCrush(config).cache(model)
    steps = []
    with record_stages() as stages:
        synchronize()
        start = time.perf_counter()
        token = prompt
        for _ in range(new_tokens):
            logits = model(input_ids=token, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
            token = logits.argmax(-1)
            synchronize()
            steps.append(time.perf_counter())
    decoding = [later - earlier for earlier, later in pairwise(steps)]
    return Run(steps[0] - start, statistics.median(decoding), steps[-1] - start, dict(stages))


def measure(
    model: Any, prompt: Tensor, new_tokens: int, repeats: int, configs: dict[str, CrushConfig | None]
) -> dict[str, list[Run]]:
    runs: dict[str, list[Run]] = defaultdict(list)
    request(model, prompt, 2, None)  # first touch of weights and allocator
    for repeat in range(repeats):
        for name in rotated(list(configs), repeat):
            runs[name].append(request(model, prompt, new_tokens, configs[name]))
            last = runs[name][-1]
            print(
                f"{repeat + 1}/{repeats} {name:16} TTFT {last.ttft:6.2f} s, TPOT {1000 * last.tpot:6.1f} ms",
                file=sys.stderr,
            )
    return runs


def summary(runs: dict[str, list[Run]]) -> dict[str, Any]:
    def ratios(name: str, value: str, base: str = "full") -> list[float]:
        return [getattr(a, value) / getattr(b, value) for a, b in zip(runs[name], runs[base], strict=True)]

    def share(stage: str, name: str = "kvcrush") -> float:
        return statistics.median(run.stages.get(stage, 0.0) / run.total for run in runs[name])

    added = [
        sum(ours.stages[s] - theirs.stages[s] for s in EVICTION) / ours.total
        for ours, theirs in zip(runs["kvcrush"], runs["importance only"], strict=True)
    ]
    ttft, tpot = ratios("kvcrush", "ttft"), ratios("kvcrush", "tpot")
    return {
        "overhead_share": statistics.median(added),
        "overhead_share_range": [min(added), max(added)],
        "ttft_ratio": statistics.median(ttft),
        "ttft_ratio_range": [min(ttft), max(ttft)],
        "tpot_ratio": statistics.median(tpot),
        "tpot_ratio_range": [min(tpot), max(tpot)],
        "ttft_ratio_importance_only": statistics.median(ratios("importance only", "ttft")),
        "tpot_ratio_importance_only": statistics.median(ratios("importance only", "tpot")),
        "stage_share": {s: share(s) for s in ("importance", "selection", *OWN_STAGES, "indices", "gather")},
        "stage_share_importance_only": {
            s: share(s, "importance only") for s in ("importance", "selection", "indices", "gather")
        },
        "seconds": {
            name: {v: statistics.median(getattr(r, v) for r in made) for v in ("ttft", "tpot", "total")}
            for name, made in runs.items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--tokens", type=int, default=4096, help="prompt length")
    parser.add_argument("--new", type=int, default=128, help="new tokens")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--model", help="Hugging Face id or folder; the embedded model where none is given")
    parser.add_argument("--policy", default="snapkv")
    parser.add_argument("--budget", default="0.25")
    parser.add_argument("--page-size", type=int, default=CrushConfig.page_size)
    parser.add_argument("--share", type=float, default=0.1, help="of KVCrush's representatives")
    parser.add_argument("--bits", default=CrushConfig.bits, help="of what is kept, but sink and window")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    arguments = parser.parse_args()

    model, prompt = load(arguments.model, arguments.tokens)

    config = CrushConfig(
        policy=arguments.policy,
        budget=arguments.budget,
        page_size=arguments.page_size,
        representative_share=arguments.share,
        bits=arguments.bits,
    )
    configs = {"full": None, "importance only": config.replace(representative_share=0.0), "kvcrush": config}
    result = {
        **summary(measure(model, prompt, arguments.new, arguments.repeats, configs)),
        "prompt_tokens": arguments.tokens,
        "new_tokens": arguments.new,
        "repeats": arguments.repeats,
        "config": config.to_dict(),
        "machine": machine(),
    }
    if arguments.json:
        print(json.dumps(result))
        return
    print(f"\n{arguments.tokens}-token prompt, {arguments.new} new tokens, {config.policy} at budget {config.budget}")
    print(f"KVCrush's own share of the latency  {result['overhead_share']:8.3%}   (limit 0.5 %, goal 0.1 %)")
    for stage in OWN_STAGES:
        print(f"    {stage:31} {result['stage_share'][stage]:8.3%}")
    print(f"eviction, all of it                 {sum(result['stage_share'][s] for s in EVICTION):8.3%}")
    print(f"importance scores                   {result['stage_share']['importance']:8.3%}")
    print(f"TTFT against the full cache         {result['ttft_ratio']:8.3f}x")
    print(f"TPOT against the full cache         {result['tpot_ratio']:8.3f}x")


if __name__ == "__main__":
    main()
