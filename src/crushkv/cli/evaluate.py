"""`crushkv fidelity`, `sweep`, `report`, `eval` and `lm-eval`: what a smaller cache costs in answers."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
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
from .options import Configs, ModelOptions, ResultOptions, with_options
from .output import Progress, check_output, console, missing, only_result_on_stdout, plain_table, print_json, say
from .output import versions as known_versions

if TYPE_CHECKING:
    from ..evaluation import Sample, Sweep

_task = functools.partial(typer.Option, rich_help_panel="Tasks")


@dataclasses.dataclass(frozen=True)
class TaskOptions:
    """Which tasks, how many prompts of each, and where they come from."""

    tasks: Annotated[
        str | None,
        _task(
            help="Names, separated by commas: any task of lm-evaluation-harness, a file of --data-dir, or "
            "retrieval_single_2k and the like.",
            metavar="NAMES",
        ),
    ] = None
    limit: Annotated[int | None, _task(help="Prompts a task, at most.", metavar="NUMBER", min=1)] = None
    chat: Annotated[bool, _task("--chat", help="Use the chat template.")] = False
    data_dir: Annotated[
        Path | None,
        _task(
            metavar="DIR",
            help="Folder of JSON lines in LongBench's format, a file a task.  [default: the harness's own data]",
        ),
    ] = None
    haystack: Annotated[
        Path | None,
        _task(metavar="PATH", help="Text in which retrieval tasks hide facts: a file or a folder.  [default: bundled]"),
    ] = None
    prompt_seed: Annotated[int, _task(metavar="INT", min=0, help="Seed of the retrieval prompts.")] = 0

    @property
    def names(self) -> list[str]:
        return [name.strip() for name in (self.tasks or "").split(",") if name.strip()]

    @property
    def given(self) -> dict[str, Any]:
        """Fields of `Sweep`, as far as they were given."""
        fields = {"tasks": self.names, "limit": self.limit, "chat": self.chat, "seed": self.prompt_seed}
        return {name: value for name, value in fields.items() if value}

    def source(self, seed: int | None = None) -> Any:
        from ..evaluation import TaskSource

        return TaskSource(self.data_dir, self.haystack, self.prompt_seed if seed is None else seed)


@dataclasses.dataclass(frozen=True)
class FidelityOptions:
    """What is compared, and along what."""

    configs: Configs = None
    answer_tokens: Annotated[
        int, typer.Option(help="How much of the full cache's answer is followed.", metavar="TOKENS", min=2)
    ] = 32
    min_prompt_tokens: Annotated[int, typer.Option(help="Leave out shorter prompts.", metavar="TOKENS")] = 1
    max_prompt_tokens: Annotated[int | None, typer.Option(help="Leave out longer prompts.", metavar="TOKENS")] = None
    trim: Annotated[bool, typer.Option("--trim", help="Cut spaces off the end of prompts.")] = False


@dataclasses.dataclass(frozen=True)
class HarnessOptions:
    """How lm-evaluation-harness runs the model."""

    full: Annotated[bool, typer.Option("--full", help="Use the full cache, for comparison.")] = False
    batch_size: Annotated[int, typer.Option(help="Prompts read together.", metavar="PROMPTS", min=1)] = 1


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


@with_options(tasks="retrieval_single_1k,retrieval_multikey_1k", limit=12)
def fidelity(*, tasks: TaskOptions, compared: FidelityOptions, result: ResultOptions, model: ModelOptions) -> None:
    """Measure how near compressed caches stay to the full one.

    KL divergence and top-1 agreement are taken along the full cache's own greedy answer, the negative log-likelihood
    along the gold answer. Each prompt is read once for all configurations. Without --config: the full cache, 16 bits
    at a quarter, and the presets.
    """
    with evaluation_extra():
        from ..evaluation import Sweep

    fields = dataclasses.asdict(compared)
    configurations = fields.pop("configs") or ["full", "readahead:budget=0.25", *PRESETS]
    sweep = Sweep.from_dict({"configurations": configurations, **fields, **tasks.given})
    found: dict[str, list[Sample]] = defaultdict(list)
    with only_result_on_stdout(result.as_json):
        _run_sweep(sweep, tasks, model, result.output, lambda sample: found[sample.name].append(sample))
    summaries = [_summary(name, found[name]) for name in sweep.configurations if found[name]]
    if result.as_json:
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
        typer.Option("--output", "-o", help="Results, a JSON line a sample. Samples in it are not measured again."),
    ] = Path("results.jsonl"),
    tasks: TaskOptions,
    model: ModelOptions,
) -> None:
    """Measure many configurations on many prompts. Options about tasks win over the file.

    An interrupted sweep goes on where it was when the same command runs again. `crushkv report` makes a page of the
    results.
    """
    with evaluation_extra():
        from ..evaluation import Sweep

    samples: list[Sample] = []
    _run_sweep(Sweep.load(file, tasks.given), tasks, model, output, samples.append)
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
    """Make a self-contained page of results: tables, plots, paired differences with intervals."""
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


@with_options(tasks="retrieval_single_1k")
def evaluate(
    *, config: CrushConfig, tasks: TaskOptions, harness: HarnessOptions, result: ResultOptions, model: ModelOptions
) -> None:
    """Run tasks of lm-evaluation-harness with a compressed cache.

    Prompts, metrics and generation are the harness's own.
    """
    check_output(result.output)
    with only_result_on_stdout(result.as_json):
        loaded = load(model)
        loaded.model.generation_config.prefill_chunk_size = model.prefill_chunk_size
        with evaluation_extra():
            import lm_eval
            from lm_eval.models.huggingface import HFLM

            from ..evaluation.harness import CrushLM
            from ..evaluation.tasks import load_tasks, quiet
        options: dict[str, Any] = {"tokenizer": loaded.tokenizer, "batch_size": harness.batch_size}
        subject = HFLM(loaded.model, **options) if harness.full else CrushLM(loaded.model, config=config, **options)
        found = list(load_tasks(tasks.names, tasks.source(), loaded.tokenizer).values())
        with quiet():
            results: Any = lm_eval.simple_evaluate(
                subject, tasks=found, limit=tasks.limit, apply_chat_template=tasks.chat
            )
    summary = {
        "command": "eval",
        "tasks": {name: _metrics(figures) for name, figures in results["results"].items()},
        "prompts": {name: counts["effective"] for name, counts in results["n-samples"].items()},
        "config": None if harness.full else config.to_dict(),
        **loaded.conditions("lm_eval"),
    }
    if result.output is not None:
        samples = {**summary, "samples": results["samples"]}
        write_text(result.output, json.dumps(samples, indent=1, ensure_ascii=False, default=str))
    if result.as_json:
        print_json(summary)
        return
    table = plain_table("task", ("prompts", "metric", "value", "standard error"))
    for task, figures in summary["tasks"].items():
        for name, value in figures.items():
            if "_stderr" not in name and name != "sample_len":
                error = figures.get(f"{name}_stderr")
                shown = f"{value:.4f}", "-" if error is None else f"{error:.4f}"
                table.add_row(task, str(summary["prompts"][task]), name, *shown)
    console().print(table)


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


def _run_sweep(
    sweep: Sweep, tasks: TaskOptions, model: ModelOptions, output: Path | None, add: Callable[[Sample], None]
) -> None:
    """Runs what is left of a sweep. `add` is given every sample, those of an earlier run included."""
    from ..evaluation import ResultsFile, Subject, plan_work, run_item

    loaded = load(model)
    versions = known_versions("lm_eval")
    subject = Subject(loaded.model, loaded.tokenizer, loaded.describe(), versions, model.prefill_chunk_size)
    with contextlib.ExitStack() as stack:
        # Advice of another package to its developers.
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", message="Using slow pure-python SequenceMatcher")
        results: ResultsFile | None = None
        if output is not None:
            results = stack.enter_context(ResultsFile(output, subject.description, subject.versions))
            for sample in results.samples:
                add(sample)
        work = plan_work(sweep, subject, tasks.source(sweep.seed), results)
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
    table = plain_table("", ("KL", "95 %", "median", "p95", "worst", "agree", "NLL", "bytes"))
    names, worst = [], []
    for number, line in enumerate(summaries, start=1):
        names.append(f"{number:3}  {line['name']} ({line['prompts']} prompts)")
        if line["kl_worst"]:
            worst.append(f"{number:3}  worst: {line['worst_prompt']['task']} {line['worst_prompt']['id']}")
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
    for part in (*names, table, *worst):
        console().print(part, markup=False, soft_wrap=isinstance(part, str))


def _metrics(figures: dict[str, Any]) -> dict[str, float]:
    """`score,none` to `score`: a filter that is called "none" filters nothing."""
    return {
        name.removesuffix(",none"): value
        for name, value in figures.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool) and value == value
    }
