"""`crushkv fidelity`, `sweep`, `report`, `eval` and `lm-eval`: what a smaller cache costs in answers."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..config import CrushConfig
from ..errors import ConfigError
from ..files import write_text
from ..machine import missing, versions
from ..presets import PRESETS
from .models import load
from .options import Configs, ModelOptions, ResultOptions, option, output_option, with_options
from .output import Progress, check_output, console, only_result_on_stdout, plain_table, print_json, say

if TYPE_CHECKING:
    from ..evaluation import Sample, Sweep

_task = functools.partial(option, panel="Tasks")
_NAMES = (
    "Names, separated by commas: any task of lm-evaluation-harness, a file of --data-dir, or retrieval_single_2k and "
    "the like."
)
_DATA = "Folder of JSON lines in LongBench's format, a file a task.  [default: the harness's own data]"
_HAYSTACK = "Text in which retrieval tasks hide facts: a file or a folder.  [default: bundled]"


@dataclasses.dataclass(frozen=True)
class TaskOptions:
    """Which tasks, how many prompts of each, and where they come from."""

    tasks: Annotated[str | None, _task(_NAMES, "NAMES")] = None
    limit: Annotated[int | None, _task("Prompts a task, at most.", "NUMBER", min=1)] = None
    chat: Annotated[bool, _task("Use the chat template.", None, "--chat")] = False
    data_dir: Annotated[Path | None, _task(_DATA, "DIR")] = None
    haystack: Annotated[Path | None, _task(_HAYSTACK, "PATH")] = None
    prompt_seed: Annotated[int, _task("Seed of the retrieval prompts.", "INT", min=0)] = 0

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
    answer_tokens: Annotated[int, option("How much of the full cache's answer is followed.", "TOKENS", min=2)] = 32
    min_prompt_tokens: Annotated[int, option("Leave out shorter prompts.", "TOKENS")] = 1
    max_prompt_tokens: Annotated[int | None, option("Leave out longer prompts.", "TOKENS")] = None
    trim: Annotated[bool, option("Cut spaces off the end of prompts.", None, "--trim")] = False


@dataclasses.dataclass(frozen=True)
class HarnessOptions:
    """How lm-evaluation-harness runs the model."""

    full: Annotated[bool, option("Use the full cache, for comparison.", None, "--full")] = False
    batch_size: Annotated[int, option("Prompts read together.", "PROMPTS", min=1)] = 1


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
        from ..evaluation.statistics import summary

    fields = dataclasses.asdict(compared)
    configurations = fields.pop("configs") or ["full", "readahead:budget=0.25", *PRESETS]
    sweep = Sweep.from_dict({"configurations": configurations, **fields, **tasks.given})
    with only_result_on_stdout(result.as_json):
        samples = _run_sweep(sweep, tasks, model, result.output)
    found = {name: [sample for sample in samples if sample.name == name] for name in sweep.configurations}
    summaries = [summary(name, measured) for name, measured in found.items() if measured]
    if result.as_json:
        for line in summaries:
            print_json(line, indent=None)
    else:
        _print_fidelity(summaries)


@with_options()
def sweep(
    file: Annotated[Path, typer.Argument(help="The sweep, in YAML.", metavar="SWEEP", show_default=False)],
    *,
    output: Annotated[
        Path, output_option("Results, a JSON line a sample. Samples in it are not measured again.")
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

    samples = _run_sweep(Sweep.load(file, tasks.given), tasks, model, output)
    say(f"{len(samples)} samples in {output}; `crushkv report {output}` makes a page of them")


@with_options()
def report(
    results: Annotated[
        list[Path], typer.Argument(help="Files of `crushkv sweep` or `fidelity -o`.", metavar="RESULTS...")
    ],
    *,
    output: Annotated[Path, output_option("The page.")] = Path("report.html"),
    plots: Annotated[Path | None, option("Write the plots as PNG and SVG into this folder, too.", "DIR")] = None,
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


def _run_sweep(sweep: Sweep, tasks: TaskOptions, model: ModelOptions, output: Path | None) -> list[Sample]:
    """Runs what is left of a sweep, and returns all of its samples, those of an earlier run included."""
    from ..evaluation import ResultsFile, Subject, plan_work, run_item

    loaded = load(model)
    told = loaded.describe(), versions("lm_eval")
    subject = Subject(loaded.model, loaded.tokenizer, *told, model.prefill_chunk_size)
    with warnings.catch_warnings(), ResultsFile(output, subject.description, subject.versions) as results:
        # Advice of another package to its developers.
        warnings.filterwarnings("ignore", message="Using slow pure-python SequenceMatcher")
        work = plan_work(sweep, subject, tasks.source(sweep.seed), results)
        for task, count in work.skipped.items():
            if count:
                say(f"{task}: {count} prompts are left out, because they are too long or too short")
        if work.known:
            say(f"{work.known} samples are there from an earlier run")
        say(f"{len(work.items)} prompts, {len(sweep.configurations)} configurations")
        # Reading a prompt takes about as long as measuring ten configurations of it.
        weights = [float(item.ids.shape[1] * (10 + len(item.configs))) for item in work.items]
        try:
            with Progress(weights) as progress:
                for item in work.items:
                    text = f"{item.prompt.task}: {item.ids.shape[1]} tokens"
                    progress.begin(text)
                    run_item(item, sweep, subject, results.add)
                    progress.done(f"{text}, {len(item.configs)} configurations")
        except KeyboardInterrupt:
            if output is not None:
                say(f"{len(results.samples)} samples are kept in {output}; the same command goes on from there")
            raise
        return results.samples


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
