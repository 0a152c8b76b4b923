"""Divides a budget over the KV heads of all layers in published and own ways, and compares them at equal bytes.

    python benchmarks/research/budgets.py run -o budgets.jsonl --data-dir DIR [--model FOLDER --chat]
    python benchmarks/research/budgets.py show budgets.jsonl... [--base profile]

A simulation, as `trial.py` is: single heads do not see what they evict, and KL is along the full cache's own answer.
`tokens` divides pages of 16 tokens in 16 bits; each form of budgets keeps the very same number of pages in all. `bytes`
divides bytes, and may give each head formats of its own. Readahead ranks the pages of a head in any
case: the forms differ only in how many of them a head keeps. Prompts are taken as `scores.py` takes them.
"""

from __future__ import annotations

import argparse
import gc
import json
from collections import defaultdict
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from bits_by_head import Formatted
from divisions import Contest, by_tokens
from follower import Follower, Prompt
from record import record
from scores import TASKS, chosen

from crushkv.cli.models import load
from crushkv.cli.options import ModelOptions
from crushkv.core import HeadNeeds
from crushkv.evaluation import TaskSource
from crushkv.evaluation.data import read_lines
from crushkv.evaluation.results import prompt_hash
from crushkv.evaluation.runner import _chat
from crushkv.evaluation.statistics import macro_mean
from crushkv.evaluation.tasks import load_tasks
from crushkv.hf.profiling import profile_of

BUDGETS = {"tokens": (0.25, 0.125, 0.0625), "bytes": (0.125, 0.0625)}
BATCH = 8  # caches in one forward pass


@torch.no_grad()
def run(arguments: Any) -> None:
    torch.set_num_threads(arguments.threads)
    loaded = load(ModelOptions(model=arguments.model, dtype="float32", device="cpu"))
    model, tokenizer, profile = loaded.model, loaded.tokenizer, profile_of(loaded.model)
    assert profile is not None
    chat, follower, needs = _chat(tokenizer) if arguments.chat else None, Follower(model), HeadNeeds(profile.needs)
    tasks = load_tasks(TASKS, TaskSource(arguments.data_dir, arguments.haystack, seed=7), tokenizer)
    limits = tuple(arguments.tokens)
    streams = [chosen(task, name, tokenizer, chat, limits, arguments.per_task) for name, task in tasks.items()]
    known = read_lines(arguments.output) if arguments.output.exists() else ()
    done = {(entry["prompt"], entry["kind"], entry["budget"]) for _, entry in known}
    cases = [(kind, budget) for kind in arguments.kinds for budget in BUDGETS[kind]]
    with arguments.output.open("a") as file:
        for given, ids in filter(None, (found for turn in zip_longest(*streams) for found in turn)):
            name = f"{given.task} {given.id} {prompt_hash(given.text)}"
            missing = [(kind, budget) for kind, budget in cases if (name, kind, budget) not in done]
            if not missing:
                continue
            prompt = Prompt(record(model, ids, arguments.answer))
            contest = Contest(prompt, needs)
            formatted = Formatted(model, contest) if any(kind == "bytes" for kind, _ in missing) else None
            for kind, budget in missing:
                forms = by_tokens(contest, budget) if formatted is None or kind == "tokens" else formatted.forms(budget)
                kl: list[float] = []
                for start in range(0, len(forms), BATCH):
                    kl += follower.kl(prompt, list(forms.values())[start : start + BATCH])
                base = {"model": loaded.name, "prompt": name, "tokens": prompt.tokens, "kind": kind, "budget": budget}
                for form, value in zip(forms, kl, strict=True):
                    entry = {**base, "form": form, "bytes": round(forms[form].nbytes, 5), "kl": round(value, 6)}
                    file.write(json.dumps(entry) + "\n")
                file.flush()
            print(name, prompt.tokens, flush=True)
            del prompt, contest, formatted, forms
            gc.collect()


def show(arguments: Any) -> None:
    """A table for each model, kind and budget: differences are paired, in parts of the base's mean.

    All prompts count alike, whatever their task: there are too few of a task to draw them within it.
    """
    tables: dict[tuple[str, str, float], dict[str, dict[str, Any]]] = defaultdict(lambda: defaultdict(dict))
    for _, entry in (line for path in arguments.results for line in read_lines(path)):
        tables[entry["model"], entry["kind"], entry["budget"]][entry["form"]][entry["prompt"]] = entry
    for (model, kind, budget), forms in tables.items():
        base = forms[arguments.base]
        print(f"\n### {model}, {budget:.2%} of the {kind}, {len(base)} prompts\n")
        print(f"| budgets | bytes | mean KL (95 %) | median | worst | minus {arguments.base} | better on |")
        print("|---|---:|---:|---:|---:|---:|---:|")
        for name, found in forms.items():
            kl = macro_mean({"all": [entry["kl"] for entry in found.values()]})
            size = sum(entry["bytes"] for entry in found.values()) / len(found)
            apart = [entry["kl"] - base[prompt]["kl"] for prompt, entry in found.items() if prompt in base]
            change, cells = macro_mean({"all": apart}), ["", ""]
            if name != arguments.base:
                mark, whole = "**" if change.excludes_zero else "", sum(base[p]["kl"] for p in found if p in base)
                mean, low, high = (x * len(apart) / whole for x in (change.mean, change.low, change.high))
                cells = [f"{mark}{mean:+.0%}{mark} ({low:+.0%} to {high:+.0%})"]
                cells.append(f"{sum(x < 0 for x in apart)} of {len(apart)}")
            figures = f"{kl.mean:.4f} ({kl.low:.4f} to {kl.high:.4f}) | {kl.median:.4f} | {kl.highest:.3f}"
            print(f"| {name} | {size:.2%} | {figures} | {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    commands = parser.add_subparsers(required=True)
    running = commands.add_parser("run")
    running.add_argument("-o", "--output", type=Path, required=True)
    running.add_argument("--model", help="folder; the embedded model otherwise")
    running.add_argument("--chat", action="store_true", help="put prompts into the chat template")
    running.add_argument("--data-dir", type=Path, required=True, help="LongBench's records as JSON lines")
    running.add_argument("--haystack", type=Path)
    running.add_argument("--kinds", nargs="+", choices=BUDGETS, default=list(BUDGETS))
    running.add_argument("--per-task", type=int, default=4)
    running.add_argument("--tokens", type=int, nargs=2, default=(750, 2400), metavar=("LEAST", "MOST"))
    running.add_argument("--answer", type=int, default=25, help="tokens of the answer; the first is not measured")
    running.add_argument("--threads", type=int, default=1)
    running.set_defaults(do=run)
    showing = commands.add_parser("show")
    showing.add_argument("results", type=Path, nargs="+")
    showing.add_argument("--base", default="profile", help="form that the others are compared with")
    showing.set_defaults(do=show)
    arguments = parser.parse_args()
    arguments.do(arguments)


if __name__ == "__main__":
    main()
