"""`crushkv fidelity`: how near compressed caches stay to the full one."""

from __future__ import annotations

import contextlib
import json
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.table import Table

from ..presets import PRESETS
from .model_loader import ModelOptions, load
from .options import MODEL, with_options
from .output import only_result_on_stdout, result_console, say
from .sweeping import PANEL, SOURCE, evaluation_extra, run_sweep, split_names

if TYPE_CHECKING:
    from ..evaluation import Sample


@with_options(source=SOURCE, model=MODEL)
def fidelity(
    *,
    tasks: Annotated[
        str, typer.Option(help="Names, separated by commas.", metavar="NAMES", rich_help_panel=PANEL)
    ] = "retrieval_single_1k,retrieval_multikey_1k",
    limit: Annotated[
        int, typer.Option(help="Prompts a task, at most.", metavar="NUMBER", min=1, rich_help_panel=PANEL)
    ] = 12,
    config: Annotated[
        list[str] | None,
        typer.Option(
            help="full, a preset, POLICY:FIELD=VALUE,... or FIELD=VALUE,... Repeatable; {a,b} stands for both.",
            metavar="TEXT",
            show_default="full, 16 bits at a quarter, and the presets",
        ),
    ] = None,
    answer_tokens: Annotated[
        int, typer.Option(help="How much of the full cache's answer is followed.", metavar="TOKENS", min=2)
    ] = 32,
    min_prompt_tokens: Annotated[int, typer.Option(help="Shorter prompts are left out.", metavar="TOKENS")] = 1,
    max_prompt_tokens: Annotated[
        int | None, typer.Option(help="Longer prompts are left out.", metavar="TOKENS")
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Use the chat template.")] = False,
    trim: Annotated[bool, typer.Option("--trim", help="Cut spaces off the end of prompts.")] = False,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Keep the samples in this file (JSON lines).", metavar="FILE"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a configuration.")] = False,
    source: Any,  # crushkv.evaluation.TaskSource
    model: ModelOptions,
) -> None:
    """Measure how near compressed caches stay to the full one.

    KL divergence and top-1 agreement are taken along the full cache's own greedy answer, the negative log-likelihood
    along the gold answer. Each prompt is read once for all configurations.
    """
    with evaluation_extra():
        from ..evaluation import Sweep

    texts = config or ["full", "readahead:budget=0.25", *PRESETS]
    sweep = Sweep.from_dict(
        {
            "tasks": split_names(tasks),
            "configurations": texts,
            "limit": limit,
            "answer_tokens": answer_tokens,
            "min_prompt_tokens": min_prompt_tokens,
            "max_prompt_tokens": max_prompt_tokens,
            "chat": chat,
            "trim": trim,
            "seed": source.seed,
        }
    )
    found: dict[str, list[Sample]] = defaultdict(list)
    with only_result_on_stdout() if as_json else contextlib.nullcontext():
        loaded = load(model, say)
        run_sweep(
            sweep, source, loaded, model.prefill_chunk_size, output, lambda sample: found[sample.name].append(sample)
        )
    figures = [summary(name, found[name]) for name in sweep.configurations if found[name]]
    if as_json:
        for line in figures:
            print(json.dumps(line, ensure_ascii=False, allow_nan=False))
    else:
        _print(figures)


def summary(name: str, samples: list[Sample]) -> dict[str, Any]:
    """Means over the tasks, each counting alike, with 95 % intervals, and KL's median, 95th percentile and worst of all
    prompts; gold_nll is None without gold answers.
    """
    from ..evaluation.statistics import by_task, macro_mean, worst_prompt

    worst = worst_prompt(samples)
    assert worst is not None
    kl = macro_mean(by_task(samples, lambda sample: sample.kl))
    nll = by_task(samples, lambda sample: sample.gold_nll)
    return {
        "name": name,
        "kl": kl.mean,
        "kl_interval": [kl.low, kl.high],
        "kl_median": kl.median,
        "kl_percentile_95": kl.percentile_95,
        "kl_worst": kl.highest,
        "worst_prompt": {"task": worst.task, "id": worst.id},
        "agreement": macro_mean(by_task(samples, lambda sample: sample.agreement)).mean,
        "gold_nll": macro_mean(nll).mean if nll else None,
        "bytes_fraction": sum(sample.bytes_fraction for sample in samples) / len(samples),
        "prompts": len(samples),
    }


def _print(figures: list[dict[str, Any]]) -> None:
    """A table. Above it stand the names of its rows, below it the names of their worst prompts, as both are long."""
    console = result_console()
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    for name in ("", "KL", "95 %", "median", "p95", "worst", "agree", "NLL", "bytes"):
        table.add_column(name, justify="right", no_wrap=True)
    for number, line in enumerate(figures, start=1):
        console.print(f"{number:3}  {line['name']} ({line['prompts']} prompts)", markup=False, soft_wrap=True)
        low, high = line["kl_interval"]
        table.add_row(
            str(number),
            f"{line['kl']:.4f}",
            f"{low:.4f} to {high:.4f}",
            *(f"{line[name]:.4f}" for name in ("kl_median", "kl_percentile_95", "kl_worst")),
            f"{line['agreement']:.1%}",
            "-" if line["gold_nll"] is None else f"{line['gold_nll']:.3f}",
            f"{line['bytes_fraction']:.1%}",
        )
    console.print(table)
    for number, line in enumerate(figures, start=1):
        if line["kl_worst"]:
            worst = line["worst_prompt"]
            console.print(f"{number:3}  worst: {worst['task']} {worst['id']}", markup=False, soft_wrap=True)
