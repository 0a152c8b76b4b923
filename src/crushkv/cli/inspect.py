"""`crushkv inspect`: which tokens of a prompt each layer and KV head keeps, as one HTML page."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..config import CrushConfig
from ..errors import ConfigError
from ..files import write_text
from .config_options import CONFIG
from .model_loader import ModelOptions, load
from .options import MODEL, with_options
from .output import say, size, versions
from .prompt_options import PROMPT, PromptOptions
from .prompts import check_room

if TYPE_CHECKING:
    from ..evaluation.inspection import Inspection


@with_options(prompt=PROMPT, config=CONFIG, model=MODEL)
def inspect(
    *,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The page; a file of that name is replaced.", metavar="FILE")
    ] = Path("inspect.html"),
    prompt: PromptOptions,
    config: CrushConfig,
    model: ModelOptions,
) -> None:
    """Show which tokens of a prompt each layer and KV head keeps, as one HTML page.

    The prompt is --prompt, --file, both (the file first), or standard input.
    """
    from ..evaluation.inspection import inspect_prompt, render

    target = _target(output)
    text = prompt.read()
    loaded = load(model, say)
    # Refuses what does not go together, in the words of the options.
    tokens = prompt.encode(loaded.tokenizer, text).shape[-1]
    check_room(tokens, 0, loaded.model.config)
    say(f"Reading {tokens} tokens")
    inspection = inspect_prompt(
        loaded.model,
        loaded.tokenizer,
        text,
        config,
        chat=prompt.chat,
        system=prompt.system,
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
