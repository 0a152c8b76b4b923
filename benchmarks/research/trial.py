"""Measures variants on recorded prompts, and compares them.

    python benchmarks/research/trial.py run FOLDER LIST... -o results.jsonl [--half even] [--per-task 3]
    python benchmarks/research/trial.py show results.jsonl [--base VARIANT]

FOLDER holds what `record.py` wrote. LIST is a file with a variant a line (`variants.Variant`); `{a,b}` stands for both.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from follower import Follower, Prompt
from variants import Variant, hold

from crushkv.config_text import expand
from crushkv.evaluation.data import read_lines
from crushkv.evaluation.statistics import macro_mean

BATCH = 7  # variants in one forward pass
HALVES = {"even": (0,), "odd": (1,), "all": (0, 1)}


def read_lists(paths: list[Path]) -> list[str]:
    """Names of variants, without those that stand there twice."""
    lines = (line.partition("#")[0].strip() for path in paths for line in path.read_text().splitlines())
    return list(dict.fromkeys(Variant.parse(text).named() for line in lines if line for text in expand(line)))


def read_results(paths: list[Path]) -> dict[str, dict[str, tuple[float, float]]]:
    """KL and bytes by variant and prompt."""
    found: dict[str, dict[str, tuple[float, float]]] = defaultdict(dict)
    for _, entry in (line for path in paths for line in read_lines(path)):
        found[entry["variant"]][entry["prompt"]] = entry["kl"], entry["bytes"]
    return found


def run(arguments: Any) -> None:
    names = read_lists(arguments.lists)
    known = read_results([arguments.output]) if arguments.output.exists() else {}
    follower = Follower()
    paths = sorted(arguments.folder.glob("*.pt"), key=lambda path: (path.stem[-2:], path.stem))
    taken: dict[str, int] = defaultdict(int)
    with arguments.output.open("a") as file:
        for path in paths:
            task, _, number = path.stem.rpartition("-")
            if int(number) % 2 not in HALVES[arguments.half] or taken[task] == arguments.per_task:
                continue
            taken[task] += 1
            missing = [name for name in names if path.stem not in known.get(name, {})]
            if not missing:
                continue
            prompt = Prompt.read(path)
            for start in range(0, len(missing), BATCH):
                batch = missing[start : start + BATCH]
                with torch.no_grad():
                    held = [hold(prompt, Variant.parse(name)) for name in batch]
                for name, cache, kl in zip(batch, held, follower.kl(prompt, held), strict=True):
                    entry = {"prompt": path.stem, "variant": name, "bytes": round(cache.nbytes, 5), "kl": round(kl, 6)}
                    file.write(json.dumps(entry) + "\n")
                file.flush()


def by_task(values: dict[str, float]) -> dict[str, list[float]]:
    found: dict[str, list[float]] = defaultdict(list)
    for prompt, value in values.items():
        found[prompt.rpartition("-")[0]].append(value)
    return found


def show(arguments: Any) -> None:
    results = read_results(arguments.results)
    base = results[Variant.parse(arguments.base).named()] if arguments.base is not None else None
    print("| variant | prompts | bytes | KL | minus the base | the same in % of the base |")
    print("|---|---:|---:|---:|---:|---:|")
    for name, found in results.items():
        half = {p: v for p, v in found.items() if int(p[-2:]) % 2 in HALVES[arguments.half]}
        if arguments.contains not in name or not half:
            continue
        kl = macro_mean(by_task({p: v[0] for p, v in half.items()}))
        size = sum(v[1] for v in half.values()) / len(half)
        cells = f"{name} | {len(half)} | {size:.2%} | {kl.mean:.4f} ({kl.low:.3f} to {kl.high:.3f})"
        if base is not None:
            common = {p: v[0] - base[p][0] for p, v in half.items() if p in base}
            against = macro_mean(by_task({p: base[p][0] for p in common})).mean
            d = macro_mean(by_task(common))
            mark = "**" if d.excludes_zero else ""
            cells += f" | {d.mean:+.4f} | {mark}{d.mean / against:+.0%}{mark}"
            if d.low < d.high:
                cells += f" ({d.low / against:+.0%} to {d.high / against:+.0%})"
        print(f"| {cells} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    commands = parser.add_subparsers(required=True)
    running = commands.add_parser("run")
    running.add_argument("folder", type=Path)
    running.add_argument("lists", type=Path, nargs="+")
    running.add_argument("-o", "--output", type=Path, required=True)
    running.add_argument("--half", choices=HALVES, default="all")
    running.add_argument("--per-task", type=int, default=100)
    running.set_defaults(do=run)
    showing = commands.add_parser("show")
    showing.add_argument("results", type=Path, nargs="+")
    showing.add_argument("--base", help="variant that the others are compared with")
    showing.add_argument("--half", choices=HALVES, default="all")
    showing.add_argument("--contains", default="", help="only variants whose name has this")
    showing.set_defaults(do=show)
    arguments = parser.parse_args()
    arguments.do(arguments)


if __name__ == "__main__":
    main()
