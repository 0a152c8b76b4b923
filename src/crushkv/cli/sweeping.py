"""What `fidelity` and `sweep` share: options for tasks and data, and the run itself."""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError
from .model_loader import LoadedModel
from .options import Group, option
from .output import installed, say, versions
from .work_progress import WorkProgress

if TYPE_CHECKING:
    from ..evaluation import ResultsFile, Sample, Sweep, TaskSource

PANEL = "Tasks"


def _source(data_dir: Path | None, haystack: Path | None, prompt_seed: int) -> TaskSource:
    with evaluation_extra():
        from ..evaluation import TaskSource

        return TaskSource(data_dir, haystack, prompt_seed)


SOURCE = Group(
    (
        option(
            "data_dir",
            Path | None,
            None,
            help="Folder of JSON lines in LongBench's format, one file a task. [dim]default: the harness's own data[/]",
            metavar="DIR",
            show_default=False,
            rich_help_panel=PANEL,
        ),
        option(
            "haystack",
            Path | None,
            None,
            help="Text file, or folder of them, in which retrieval tasks hide facts. [dim]default: bundled[/]",
            metavar="PATH",
            show_default=False,
            rich_help_panel=PANEL,
        ),
        option("prompt_seed", int, 0, help="Of the retrieval prompts.", metavar="NUMBER", min=0, rich_help_panel=PANEL),
    ),
    _source,
)


@contextlib.contextmanager
def evaluation_extra() -> Iterator[None]:
    """Raises `ConfigError` where the packages of the extra `eval` are missing."""
    try:
        yield
    except ImportError as error:
        raise ConfigError(f"{error}: evaluation needs more packages, pip install 'crushkv[eval]'") from None


def evaluation_versions() -> dict[str, str | None]:
    return {**versions(), "lm_eval": installed("lm_eval")}


def split_names(text: str) -> list[str]:
    """`a,b` to its names."""
    return [name.strip() for name in text.split(",") if name.strip()]


def run_sweep(
    sweep: Sweep,
    source: TaskSource,
    loaded: LoadedModel,
    prefill_chunk_size: int | None,
    output: Path | None,
    add: Callable[[Sample], None],
) -> None:
    """Runs what is left of a sweep. `add` is given every sample, those of an earlier run included."""
    from ..evaluation import ResultsFile, Subject, plan_work, run_item

    source = dataclasses.replace(source, seed=sweep.seed)
    subject = Subject(loaded.model, loaded.tokenizer, loaded.describe(), evaluation_versions(), prefill_chunk_size)
    with contextlib.ExitStack() as stack, _quiet_libraries():
        results: ResultsFile | None = None
        if output is not None:
            results = stack.enter_context(ResultsFile(output, subject.description, subject.versions))
            for sample in results.samples:
                add(sample)
        work = plan_work(sweep, subject, source, results)
        for task, count in work.skipped.items():
            if count:
                say(f"{task}: {count} prompts left out, too long or too short")
        if work.known:
            say(f"{work.known} samples are there from an earlier run")
        say(f"{len(work.items)} prompts, {len(sweep.configurations)} configurations")

        def take(sample: Sample) -> None:
            if results is not None:
                results.add(sample)
            add(sample)

        progress = stack.enter_context(WorkProgress([_weight(item) for item in work.items]))
        try:
            for item in work.items:
                text = f"{item.prompt.task}: {item.ids.shape[1]} tokens"
                progress.begin(text)
                run_item(item, sweep, subject, take)
                progress.done(f"{text}, {len(item.configs)} configurations")
        except KeyboardInterrupt:
            if results is not None:
                say(f"{len(results.samples)} samples are kept in {output}; the same command goes on from there")
            raise


def _weight(item: Any) -> float:
    """Reading a prompt costs about as much as ten configurations of it."""
    return float(item.ids.shape[1] * (10 + len(item.configs)))


@contextlib.contextmanager
def _quiet_libraries() -> Iterator[None]:
    """Advice of other packages to their developers; crushkv's own warnings pass."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Using slow pure-python SequenceMatcher")
        yield
