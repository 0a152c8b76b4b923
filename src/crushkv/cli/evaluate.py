"""`crushkv fidelity`, `sweep`, `report`, `eval` and `lm-eval`: what a smaller cache costs in answers."""

from __future__ import annotations

import contextlib
import json
import sys
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..config import CrushConfig
from ..errors import ConfigError
from ..files import write_text
from ..presets import PRESETS
from .models import load
from .options import Chat, Configs, Json, ModelOptions, TaskOptions, split_names, with_options
from .output import check_output, missing, only_result_on_stdout, plain_table, print_json, result_console, say, versions
from .progress import Progress

if TYPE_CHECKING:
    from ..evaluation import Sample, Sweep

PANEL = "Tasks"
Tasks = Annotated[
    str,
    typer.Option(
        help="Names, separated by commas: any task of lm-evaluation-harness, a file of --data-dir, or "
        "retrieval_single_2k and the like.",
        metavar="NAMES",
        rich_help_panel=PANEL,
    ),
]
Limit = Annotated[
    int | None,
    typer.Option(help="At most so many prompts of each task.", metavar="NUMBER", min=1, rich_help_panel=PANEL),
]
Results = Annotated[
    Path | None, typer.Option("--output", "-o", help="Keep the samples in this file (JSON lines).", metavar="FILE")
]


@contextlib.contextmanager
def evaluation_extra() -> Iterator[None]:
    """Raises `ConfigError` with all that is missing where packages of the extra `eval` are not installed."""
    try:
        yield
    except ImportError as error:
        names = ", ".join(missing("eval")) or str(error)
        raise ConfigError(
            f"evaluation needs packages that are not installed ({names}): pip install 'crushkv[eval]', or "
            "pip install '.[eval]' in a clone"
        ) from None


@with_options()
def fidelity(
    *,
    configs: Configs = None,
    tasks: Tasks = "retrieval_single_1k,retrieval_multikey_1k",
    limit: Limit = 12,
    answer_tokens: Annotated[
        int, typer.Option(help="So many tokens of the full cache's answer are followed.", metavar="TOKENS", min=2)
    ] = 32,
    min_prompt_tokens: Annotated[int, typer.Option(help="Leave out shorter prompts.", metavar="TOKENS")] = 1,
    max_prompt_tokens: Annotated[int | None, typer.Option(help="Leave out longer prompts.", metavar="TOKENS")] = None,
    chat: Chat = False,
    trim: Annotated[bool, typer.Option("--trim", help="Cut spaces off the end of prompts.")] = False,
    output: Results = None,
    as_json: Json = False,
    source: TaskOptions,
    model: ModelOptions,
) -> None:
    """Measure how near compressed caches stay to the full one.

    KL divergence and top-1 agreement follow the full cache's own greedy answer; the negative log-likelihood is that of
    the gold answer. Each prompt is read once for all configurations. Without --config: the full cache, 16 bits
    at a quarter, and the presets.
    """
    with evaluation_extra():
        from ..evaluation import Sweep

    sweep = Sweep.from_dict(
        {
            "tasks": split_names(tasks),
            "configurations": configs or ["full", "readahead:budget=0.25", *PRESETS],
            "limit": limit,
            "answer_tokens": answer_tokens,
            "min_prompt_tokens": min_prompt_tokens,
            "max_prompt_tokens": max_prompt_tokens,
            "chat": chat,
            "trim": trim,
            "seed": source.prompt_seed,
        }
    )
    found: dict[str, list[Sample]] = defaultdict(list)
    with only_result_on_stdout(as_json):
        _run_sweep(sweep, source, model, output, lambda sample: found[sample.name].append(sample))
    summaries = [_summary(name, found[name]) for name in sweep.configurations if found[name]]
    if as_json:
        for summary in summaries:
            print_json(summary, indent=None)
    else:
        _print_fidelity(summaries)


@with_options()
def sweep(
    file: Annotated[Path, typer.Argument(help="The sweep, in YAML.", metavar="SWEEP", show_default=False)],
    *,
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            help="The results, one JSON line for each sample. Samples in this file are not measured again.",
        ),
    ] = Path("results.jsonl"),
    tasks: Annotated[
        str | None, typer.Option(help="Use these instead of the file's.", metavar="NAMES", rich_help_panel=PANEL)
    ] = None,
    limit: Limit = None,
    chat: Chat = False,
    source: TaskOptions,
    model: ModelOptions,
) -> None:
    """Measure many configurations on many prompts.

    An interrupted sweep goes on where it was when the same command runs again. `crushkv report` makes a page of the
    results.
    """
    with evaluation_extra():
        from ..evaluation import Sweep

    given = {"tasks": split_names(tasks or ""), "limit": limit, "chat": chat, "seed": source.prompt_seed}
    planned = Sweep.load(file, {name: value for name, value in given.items() if value})
    samples: list[Sample] = []
    _run_sweep(planned, source, model, output, samples.append)
    say(f"{len(samples)} samples in {output}; `crushkv report {output}` makes a page of them")


@with_options()
def report(
    results: Annotated[
        list[Path], typer.Argument(help="Files of `crushkv sweep` or `fidelity -o`.", metavar="RESULTS...")
    ],
    *,
    output: Annotated[Path, typer.Option("--output", "-o", help="The page.", metavar="FILE")] = Path("report.html"),
    plots: Annotated[
        Path | None, typer.Option(help="Write the plots as PNG and SVG into this folder, too.", metavar="DIR")
    ] = None,
) -> None:
    """Make a page of results that needs no other file: a plot, tables, and differences with intervals."""
    check_output(output)
    with evaluation_extra():
        from ..evaluation import read_report_samples
        from ..evaluation.plots import figures, save
        from ..evaluation.report import render
        from ..evaluation.tables import rows
    samples = read_report_samples(results)
    table = rows(samples)
    write_text(output, render(samples, table=table))
    say(f"{output}: {len(samples)} samples")
    if plots is not None:
        drawn = figures(table)
        save(drawn, plots)
        say(f"{plots}: {', '.join(drawn)} as PNG and SVG")


@with_options()
def evaluate(
    *,
    config: CrushConfig,
    tasks: Tasks = "retrieval_single_1k",
    limit: Limit = None,
    full: Annotated[bool, typer.Option("--full", help="Use the full cache, for comparison.")] = False,
    chat: Chat = False,
    batch_size: Annotated[int, typer.Option(help="Prompts read together.", metavar="PROMPTS", min=1)] = 1,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write results and answers here (JSON).", metavar="FILE")
    ] = None,
    as_json: Json = False,
    source: TaskOptions,
    model: ModelOptions,
) -> None:
    """Run tasks of lm-evaluation-harness with a compressed cache.

    Prompts, metrics and generation are the harness's own.
    """
    check_output(output)
    with only_result_on_stdout(as_json):
        loaded = load(model)
        loaded.model.generation_config.prefill_chunk_size = model.prefill_chunk_size
        with evaluation_extra():
            import lm_eval
            from lm_eval.models.huggingface import HFLM

            from ..evaluation.harness import CrushLM
            from ..evaluation.tasks import load_tasks, quiet
        options: dict[str, Any] = {"tokenizer": loaded.tokenizer, "batch_size": batch_size}
        harness = HFLM(loaded.model, **options) if full else CrushLM(loaded.model, config=config, **options)
        found = list(load_tasks(split_names(tasks), _source(source), loaded.tokenizer).values())
        with quiet():
            results: Any = lm_eval.simple_evaluate(harness, tasks=found, limit=limit, apply_chat_template=chat)
    result = {
        "command": "eval",
        "tasks": {name: _metrics(figures) for name, figures in results["results"].items()},
        "prompts": {name: counts["effective"] for name, counts in results["n-samples"].items()},
        "config": None if full else config.to_dict(),
        **loaded.conditions("lm_eval"),
    }
    if output is not None:
        samples = {**result, "samples": results["samples"]}
        write_text(output, json.dumps(samples, indent=1, ensure_ascii=False, default=str))
    if as_json:
        print_json(result)
        return
    table = plain_table("task", ("prompts", "metric", "value", "standard error"))
    for task, figures in result["tasks"].items():
        for name, value in figures.items():
            if "_stderr" not in name and name != "sample_len":
                error = figures.get(f"{name}_stderr")
                shown = f"{value:.4f}", "-" if error is None else f"{error:.4f}"
                table.add_row(task, str(result["prompts"][task]), name, *shown)
    result_console().print(table)


def lm_eval(context: typer.Context) -> None:
    """Run lm-evaluation-harness's own command line with the model `crushkv`.

    As in: crushkv lm-eval --model crushkv --model_args pretrained=MODEL,policy=snapkv,budget=0.25 --tasks ...
    """
    with evaluation_extra():
        from lm_eval.__main__ import cli_evaluate

        from ..evaluation import harness  # noqa: F401  (registers the model)
    before = sys.argv
    sys.argv = ["lm_eval", *context.args]
    try:
        cli_evaluate()
    finally:
        sys.argv = before


def _source(options: TaskOptions, seed: int | None = None) -> Any:
    from ..evaluation import TaskSource

    return TaskSource(options.data_dir, options.haystack, options.prompt_seed if seed is None else seed)


def _run_sweep(
    sweep: Sweep, source: TaskOptions, model: ModelOptions, output: Path | None, add: Callable[[Sample], None]
) -> None:
    """Runs what is left of a sweep. `add` is given every sample, those of an earlier run included."""
    from ..evaluation import ResultsFile, Subject, plan_work, run_item

    loaded = load(model)
    subject = Subject(loaded.model, loaded.tokenizer, loaded.describe(), versions("lm_eval"), model.prefill_chunk_size)
    with contextlib.ExitStack() as stack:
        # Advice of another package to its developers.
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", message="Using slow pure-python SequenceMatcher")
        results: ResultsFile | None = None
        if output is not None:
            results = stack.enter_context(ResultsFile(output, subject.description, subject.versions))
            for sample in results.samples:
                add(sample)
        work = plan_work(sweep, subject, _source(source, sweep.seed), results)
        for task, count in work.skipped.items():
            if count:
                say(f"{task}: {count} prompts are left out, because they are too long or too short")
        if work.known:
            say(f"{work.known} samples are there from an earlier run")
        say(f"{len(work.items)} prompts, {len(sweep.configurations)} configurations")

        def keep(sample: Sample) -> None:
            if results is not None:
                results.add(sample)
            add(sample)

        # Reading a prompt takes about as long as measuring ten configurations of it.
        weights = [float(item.ids.shape[1] * (10 + len(item.configs))) for item in work.items]
        progress = stack.enter_context(Progress(weights))
        try:
            for item in work.items:
                text = f"{item.prompt.task}: {item.ids.shape[1]} tokens"
                progress.begin(text)
                run_item(item, sweep, subject, keep)
                progress.done(f"{text}, {len(item.configs)} configurations")
        except KeyboardInterrupt:
            if results is not None:
                say(f"{len(results.samples)} samples are kept in {output}; the same command goes on from there")
            raise


def _summary(name: str, samples: list[Sample]) -> dict[str, Any]:
    """Means over the tasks with 95 % intervals, each task counting alike; KL's median, 95th percentile and worst.

    `gold_nll` is None without gold answers.
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


def _print_fidelity(summaries: list[dict[str, Any]]) -> None:
    """A table of numbers. The long names of its rows stand above it, and those of the worst prompts below."""
    console = result_console()
    table = plain_table("", ("KL", "95 %", "median", "p95", "worst", "agree", "NLL", "bytes"))
    for number, line in enumerate(summaries, start=1):
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
    for number, line in enumerate(summaries, start=1):
        if line["kl_worst"]:
            worst = line["worst_prompt"]
            console.print(f"{number:3}  worst: {worst['task']} {worst['id']}", markup=False, soft_wrap=True)


def _metrics(figures: dict[str, Any]) -> dict[str, float]:
    """Renames `score,none` to `score`: "none" is the name of a filter that does nothing."""
    return {
        name.removesuffix(",none"): value
        for name, value in figures.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool) and value == value
    }
