"""`crushkv sweep`: many configurations on many prompts, into a file of results."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .model_loader import ModelOptions, load
from .options import MODEL, with_options
from .output import say
from .sweeping import PANEL, SOURCE, evaluation_extra, run_sweep, split_names


@with_options(source=SOURCE, model=MODEL)
def sweep(
    file: Annotated[Path, typer.Argument(help="The sweep, in YAML.", metavar="SWEEP", show_default=False)],
    *,
    output: Annotated[
        Path,
        typer.Option("--output", "-o", help="Results, one JSON line a sample. What is there is not measured again."),
    ] = Path("results.jsonl"),
    tasks: Annotated[
        str | None, typer.Option(help="These instead of the file's.", metavar="NAMES", rich_help_panel=PANEL)
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(help="Prompts a task, instead of the file's.", metavar="NUMBER", min=1, rich_help_panel=PANEL),
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Use the chat template, whatever the file says.", rich_help_panel=PANEL)
    ] = False,
    source: Any,  # crushkv.evaluation.TaskSource
    model: ModelOptions,
) -> None:
    """Measure many configurations on many prompts.

    May be interrupted: the same command goes on where it was. `crushkv report` makes a page of the results.
    """
    with evaluation_extra():
        from ..evaluation import Sweep

    overrides: dict[str, Any] = {"tasks": None if tasks is None else split_names(tasks), "limit": limit}
    overrides["chat"] = chat or None
    overrides = {name: value for name, value in overrides.items() if value is not None}
    if source.seed:
        overrides["seed"] = source.seed
    planned = Sweep.load(file, overrides)
    loaded = load(model, say)
    count = 0

    def add(_: Any) -> None:
        nonlocal count
        count += 1

    run_sweep(planned, source, loaded, model.prefill_chunk_size, output, add)
    say(f"{count} samples in {output}; `crushkv report {output}` makes a page of them")
