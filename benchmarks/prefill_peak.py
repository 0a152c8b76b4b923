"""Peak resident memory of reading a prompt, above that of the same pass without any cache.

    python benchmarks/prefill_peak.py [--tokens 4096,8192]

Each measurement has a process of its own, in which every allocation of 1 MiB or more is given back to the system when
it is freed: glibc otherwise keeps some of them, and peaks of the same request differ by a factor of two.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import DynamicCache

from crushkv import CrushConfig, KVCrush
from crushkv.timing.measure import PeakMemory
from subject import load

MIB = 2**20
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": str(MIB), "MALLOC_TRIM_THRESHOLD_": str(MIB)}
QUARTER = CrushConfig(policy="snapkv", budget=0.25, representative_share=0.1)
METHODS: dict[str, CrushConfig | None] = {
    "no cache": None,
    "full cache": None,
    "SnapKV at a quarter": QUARTER,
    "H2O at a quarter": QUARTER.replace(policy="h2o"),
    "balanced": CrushConfig.preset("balanced"),
}


def peak(method: str, tokens: int) -> float:
    """MiB above what the process took before."""
    model, prompt = load(None, tokens)
    with torch.inference_mode():
        model(input_ids=prompt[:, :256], use_cache=False, logits_to_keep=1)
        cache: Any = None
        config = METHODS[method]
        if method == "full cache":
            cache = DynamicCache(config=model.config)
        elif config is not None:
            cache = KVCrush(config).cache(model)
        memory = PeakMemory(model.device)
        if memory.before is None:
            raise SystemExit("this system does not tell the peak of a process's memory")
        model(input_ids=prompt, past_key_values=cache, use_cache=cache is not None, logits_to_keep=1)
        return ((memory.peak() or 0) - memory.before) / MIB


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--tokens", default="4096,8192")
    parser.add_argument("--one", nargs=2, metavar=("METHOD", "TOKENS"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(peak(given.one[0], int(given.one[1])))
        return
    lengths = given.tokens.split(",")
    table = Table("MiB", *(f"{tokens} tokens" for tokens in lengths))
    without: dict[str, float] = {}
    for method in METHODS:
        cells = []
        for tokens in lengths:
            command = [sys.executable, __file__, "--one", method, tokens]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=os.environ | GIVE_BACK)
            found = float(done.stdout)
            without.setdefault(tokens, found)
            cells.append(f"{found:.0f} ({found - without[tokens]:+.0f})")
        table.add_row(method, *cells)
    Console(highlight=False).print(table)


if __name__ == "__main__":
    main()
