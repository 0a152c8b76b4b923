"""`crushkv policies`, `inspect` and `profile`: what can be chosen, what a prompt keeps, what a model needs."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..config import CrushConfig
from ..errors import ConfigError
from ..files import write_text
from .models import load
from .options import Json, ModelOptions, PromptOptions, with_options
from .output import check_output, print_json, result_console, say, seconds, size, versions

if TYPE_CHECKING:
    from ..importance import Policy

REQUIRED = "(required)"


@with_options()
def policies(*, as_json: Json = False) -> None:
    """List the importance policies and their options."""
    from rich.table import Table
    from rich.text import Text

    from ..importance import failed_policies
    from ..importance import policies as known_policies

    found = [_describe(policy) for policy in known_policies().values()]
    if as_json:
        print_json({"command": "policies", "policies": found, "failed": failed_policies()})
        return
    table = Table("policy", "options", "queries", "paper")
    for policy in found:
        options = "\n".join(f"{name}={value}" for name, value in policy["options"].items())
        table.add_row(policy["name"], options, policy["queries"], policy["paper"])
    console = result_console()
    console.print(table)
    for name, reason in failed_policies().items():
        console.print(Text(f"{name}: the entry point {reason}", style="red"))


def _describe(policy: type[Policy]) -> dict[str, Any]:
    """Name, paper, options with their defaults, and which queries the scores come from."""
    import inspect

    options = {}
    for field in dataclasses.fields(policy):
        made = field.default_factory
        options[field.name] = field.default if made is dataclasses.MISSING else made()
        if options[field.name] is dataclasses.MISSING:
            options[field.name] = REQUIRED
    return {
        "name": policy.name,
        "paper": policy.paper,
        "summary": (inspect.getdoc(policy) or "").split("\n\n")[0],
        "options": options,
        "queries": None if REQUIRED in options.values() else _queries(policy()),
        "layer_budget": policy.layer_budget,
    }


def _queries(policy: Policy) -> str:
    if policy.streams:
        return "all"
    small, large = policy.queries(1), policy.queries(2)
    return "window" if small < large else f"last {small}" if small else "none"


@with_options()
def inspect(
    *,
    prompt: PromptOptions,
    config: CrushConfig,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The page; a file of that name is replaced.", metavar="FILE")
    ] = Path("inspect.html"),
    model: ModelOptions,
) -> None:
    """Show which tokens of a prompt each layer and KV head keeps, as one HTML page.

    The prompt is --prompt, --file, both (the file first), or standard input.
    """
    from ..evaluation.inspection import inspect_prompt, render
    from ..prompts import encode

    check_output(output)
    text = prompt.read()
    loaded = load(model)
    tokens = encode(loaded.tokenizer, text, prompt.chat, prompt.system).shape[-1]
    loaded.check_room(tokens)
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
    target = output.expanduser().resolve()
    write_text(target, render(inspection))
    report = inspection.report
    kept = f"{report.tokens_held:.0f} of {report.tokens_seen} tokens are kept per layer and KV head"
    if not inspection.evicted:
        kept = f"all {report.tokens_seen} tokens are kept, nothing was evicted"
    say(f"{output} ({size(target.stat().st_size)}): {kept}")


@with_options()
def profile(
    name: Annotated[
        str | None, typer.Argument(help="Hugging Face id or folder, as --model.", metavar="MODEL", show_default=False)
    ] = None,
    *,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="The profile.",
            metavar="FILE",
            show_default="in the user's cache folder, where it is found",
        ),
    ] = None,
    model: ModelOptions,
) -> None:
    """Measure a model's keys and queries once, and keep that as a small file.

    A profile is found by itself in the user's cache folder, and beside the model's files as
    crushkv-profile.safetensors.
    """
    import time

    from ..hf import profile_model
    from ..hf.profiling import keep_profile

    if name is not None and model.model is not None:
        raise ConfigError(f"--model {model.model!r}: the model is given already, as {name!r}")
    check_output(output)
    loaded = load(dataclasses.replace(model, model=name or model.model))
    begin = time.perf_counter()
    made = profile_model(loaded.model, loaded.tokenizer, say)
    say(f"Measured in {seconds(time.perf_counter() - begin)}")
    if output is None:
        keep_profile(loaded.model, made, say)
        return
    made.save(output)
    layers, heads, channels = made.keys.shape
    say(f"{output} ({size(output.stat().st_size)}): {layers} layers, {heads} KV heads, {channels} channels")
