"""`crushkv inspect`: which tokens of a prompt each layer and KV head keeps, as one HTML page."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..config import CrushConfig
from ..errors import ConfigError
from .config_options import CONFIG
from .files import write_text
from .model_loader import ModelOptions, load
from .options import MODEL, with_options
from .output import say, size, versions
from .prompts import check_room, encode, read_prompt

if TYPE_CHECKING:
    from ..evaluation.inspection import Inspection

PROMPT = "Prompt"


@with_options(config=CONFIG, model=MODEL)
def inspect(
    *,
    prompt: Annotated[
        str | None, typer.Option(help="The prompt; - is standard input.", metavar="TEXT", rich_help_panel=PROMPT)
    ] = None,
    file: Annotated[
        str | None,
        typer.Option(help="A file that comes before it; - is standard input.", metavar="FILE", rich_help_panel=PROMPT),
    ] = None,
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--no-chat",
            help="Use the chat template.",
            show_default="where there is one",
            rich_help_panel=PROMPT,
        ),
    ] = None,
    system: Annotated[str | None, typer.Option(help="System message.", metavar="TEXT", rich_help_panel=PROMPT)] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The page; a file of that name is replaced.", metavar="FILE")
    ] = Path("inspect.html"),
    config: CrushConfig,
    model: ModelOptions,
) -> None:
    """Show which tokens of a prompt each layer and KV head keeps, as one HTML page.

    The prompt is --prompt, --file, both (the file first), or standard input.
    """
    from ..evaluation.inspection import inspect_prompt, render

    target = _target(output)
    text = read_prompt(prompt, file)
    loaded = load(model, say)
    # Refuses what does not go together, in the words of the options.
    tokens = encode(loaded.tokenizer, text, chat, system).shape[-1]
    check_room(tokens, 0, loaded.model.config)
    say(f"Reading {tokens} tokens")
    inspection = inspect_prompt(
        loaded.model,
        loaded.tokenizer,
        text,
        config,
        chat=chat,
        system=system,
        prefill_chunk_size=model.prefill_chunk_size,
        description=loaded.describe(),
        versions=versions(),
    )
    write_text(target, render(inspection))
    say(f"{output} ({size(target.stat().st_size)}): {_kept(inspection)}")


def _target(output: Path) -> Path:
    """Where the page goes; refused before the model runs if it cannot go there."""
    target = output.expanduser().resolve()
    if not target.parent.is_dir():
        raise ConfigError(f"--output {str(output)!r}: the folder does not exist")
    if target.exists() and not target.is_file():
        raise ConfigError(f"--output {str(output)!r}: this is there already, and is no file")
    return target


def _kept(inspection: Inspection) -> str:
    report = inspection.report
    if not inspection.evicted:
        return f"all {report.tokens_seen} tokens are kept, nothing was evicted"
    return f"{report.tokens_held:.0f} of {report.tokens_seen} tokens are kept per layer and KV head"
