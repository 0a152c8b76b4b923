"""`crushkv eval`: any task of lm-evaluation-harness with a compressed cache."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from ..config import CrushConfig
from ..errors import ConfigError
from .config_options import CONFIG
from .model_loader import LoadedModel, ModelOptions, load
from .options import MODEL, with_options
from .output import check_folder, only_result_on_stdout, print_json, result_console, say
from .sweeping import PANEL, SOURCE, evaluation_extra, evaluation_versions, split_names


@with_options(source=SOURCE, config=CONFIG, model=MODEL)
def evaluate(
    *,
    tasks: Annotated[
        str,
        typer.Option(
            help="Names, separated by commas: any task of the harness, a file of --data-dir, or retrieval_single_2k "
            "and the like.",
            metavar="NAMES",
            rich_help_panel=PANEL,
        ),
    ] = "retrieval_single_1k",
    limit: Annotated[
        int | None, typer.Option(help="Prompts a task.", metavar="NUMBER", min=1, rich_help_panel=PANEL)
    ] = None,
    full: Annotated[bool, typer.Option("--full", help="Use the full cache, for comparison.")] = False,
    chat: Annotated[bool, typer.Option("--chat", help="Use the chat template.")] = False,
    batch_size: Annotated[int, typer.Option(help="Prompts read together.", metavar="PROMPTS", min=1)] = 1,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write results and answers here (JSON).", metavar="FILE")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
    source: Any,  # crushkv.evaluation.TaskSource
    config: CrushConfig,
    model: ModelOptions,
) -> None:
    """Run tasks of lm-evaluation-harness with a compressed cache.

    Prompts, metrics and generation are the harness's own.
    """
    if output is not None:
        check_folder(output)
    with only_result_on_stdout() if as_json else contextlib.nullcontext():
        loaded = load(model, say)
        loaded.model.generation_config.prefill_chunk_size = model.prefill_chunk_size
        with evaluation_extra():
            results = _run(loaded, None if full else config, split_names(tasks), source, limit, chat, batch_size)
    result = {
        "command": "eval",
        "tasks": {name: _metrics(figures) for name, figures in results["results"].items()},
        "prompts": {name: counts["effective"] for name, counts in results["n-samples"].items()},
        "config": None if full else config.to_dict(),
        "model": loaded.describe(),
        "versions": evaluation_versions(),
    }
    if output is not None:
        text = json.dumps({**result, "samples": results["samples"]}, indent=1, ensure_ascii=False, default=str)
        try:
            output.write_text(text, encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"--output {str(output)!r}: {error}") from None
    if as_json:
        print_json(result)
    else:
        _print(result)


def _run(
    loaded: LoadedModel,
    config: CrushConfig | None,
    tasks: list[str],
    source: Any,  # crushkv.evaluation.TaskSource
    limit: int | None,
    chat: bool,
    batch_size: int,
) -> dict[str, Any]:
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    from ..evaluation.harness import CrushLM
    from ..evaluation.tasks import load_tasks, quiet

    options: dict[str, Any] = {"tokenizer": loaded.tokenizer, "batch_size": batch_size}
    model = HFLM(loaded.model, **options) if config is None else CrushLM(loaded.model, config=config, **options)
    found = list(load_tasks(tasks, source, loaded.tokenizer).values())
    with quiet():
        results: Any = lm_eval.simple_evaluate(model, tasks=found, limit=limit, apply_chat_template=chat)
    return dict(results)


def _metrics(figures: dict[str, Any]) -> dict[str, float]:
    """`score,none` to `score`: the filter's name says nothing where there is one."""
    return {
        name.removesuffix(",none"): value
        for name, value in figures.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool) and value == value
    }


def _print(result: dict[str, Any]) -> None:
    table = Table("task", "prompts", "metric", "value", "standard error")
    for task, figures in result["tasks"].items():
        for name, value in figures.items():
            if "_stderr" in name or name in ("sample_len", "alias"):
                continue
            error = figures.get(f"{name}_stderr")
            table.add_row(
                task, str(result["prompts"][task]), name, f"{value:.4f}", "-" if error is None else f"{error:.4f}"
            )
    result_console().print(table)
