"""The ratios that matter, beside those that were stored: to be read before a release. Under three minutes on 2 cores.

    python benchmarks/quick.py [--store]

A prompt of 2,048 tokens, 16 new ones, five rounds; SnapKV and H2O with KVCrush's representatives at a quarter. Ratios
are to the full cache in the same round. A difference is worth a look where the ranges do not overlap.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from crushkv import CrushConfig
from crushkv.timing import Figure, Request, Spread, measure_request, rotated, summarize
from crushkv.timing.measure import warm_up
from subject import load, machine

STORED = Path(__file__).with_name("quick.json")
TOKENS, NEW_TOKENS, ROUNDS = 2048, 16, 5
QUARTER = CrushConfig(policy="snapkv", budget=0.25, representative_share=0.1)
METHODS = {"full": None, "snapkv": QUARTER, "h2o": QUARTER.replace(policy="h2o")}


def measure() -> list[Figure]:
    """Every method but the full cache."""
    model, prompt = load(None, TOKENS)
    for config in METHODS.values():
        warm_up(model, prompt, config)
    records = []
    for repeat in range(ROUNDS):
        print(f"round {repeat + 1} of {ROUNDS}", file=sys.stderr)
        for name in rotated(list(METHODS), repeat):
            request = Request(TOKENS, 1, NEW_TOKENS, name, METHODS[name], repeat)
            records.append(measure_request(model, prompt, request))
    return [figure for figure in summarize(records) if figure.method != "full"]


def ratios(figure: Figure) -> dict[str, list[float]]:
    """Median, lowest, highest by name."""
    share = figure.own_share or 0.0
    found = {"TTFT": figure.ttft_ratio, "TPOT": figure.tpot_ratio, "own share": Spread(share, share, share)}
    return {
        f"{figure.method} {name}": [spread.median, spread.low, spread.high]
        for name, spread in found.items()
        if spread is not None
    }


def show(now: dict[str, list[float]], stored: dict[str, Any]) -> None:
    table = Table("", "now", "range", "stored", "range")
    for name, found in now.items():
        before = stored["ratios"].get(name)
        table.add_row(name, *_cells(name, found), *(_cells(name, before) if before else ("-", "-")))
    console = Console(highlight=False)
    console.print(table)
    console.print(f"stored on {stored.get('machine', 'no machine yet')}", style="dim")


def _cells(name: str, values: list[float]) -> tuple[str, str]:
    median, low, high = values
    if name.endswith("share"):
        return f"{median:.3%}", ""
    return f"{median:.2f}x", f"{low:.2f} to {high:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--store", action="store_true", help="keep what was measured as what to compare with")
    arguments = parser.parse_args()
    now = {name: values for figure in measure() for name, values in ratios(figure).items()}
    stored = json.loads(STORED.read_text()) if STORED.exists() else {"ratios": {}}
    show(now, stored)
    if arguments.store:
        STORED.write_text(json.dumps({"ratios": now, "machine": machine()}, indent=2) + "\n")


if __name__ == "__main__":
    main()
