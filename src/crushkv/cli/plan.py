"""`crushkv plan`: what a cache will hold, before anything runs."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

import typer
from rich.table import Table

from ..config import CrushConfig
from .models import load_config
from .options import with_options
from .output import print_json, result_console, size


@with_options()
def plan(
    tokens: Annotated[int, typer.Argument(help="Length of the prompt, in tokens.", metavar="TOKENS", min=1)],
    *,
    model: Annotated[
        str | None,
        typer.Option(
            help="Hugging Face id or folder. [dim]default: SmolLM2-135M-Instruct, embedded[/]",
            metavar="MODEL",
            show_default=False,
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
    config: CrushConfig,
) -> None:
    """Show how a budget is split between the tiers, for a model and a prompt's length.

    Reads the model's configuration only. Bytes count 16 bits for a number that is not quantized.
    """
    from ..hf import plan_cache

    name, model_config = load_config(model)
    found = plan_cache(model_config, config, tokens)
    layers = [{"layer": index, **dataclasses.asdict(split)} for index, split in enumerate(found.layers)]
    if as_json:
        print_json(
            {
                "command": "plan",
                "model": name,
                "tokens": tokens,
                "config": config.to_dict(),
                "untouched": found.untouched,
                "kv_bytes": found.nbytes,
                "full_kv_bytes": found.full_bytes,
                "bytes_fraction": found.fraction,
                "other_layers": found.other_layers,
                "layers": layers,
            }
        )
        return
    console = result_console()
    console.print(_table(layers, config))
    console.print(
        f"{name}, {tokens} tokens: {size(found.nbytes)} of {size(found.full_bytes)} ({found.fraction:.1%}, "
        f"{1 / found.fraction:.1f} times smaller)"
    )
    if found.untouched:
        console.print(f"A fraction leaves prompts of fewer than {config.min_tokens} tokens (min_tokens) as they are.")
    if found.other_layers:
        console.print(f"{found.other_layers} layers (sliding or recurrent ones) are left alone and not counted.")


def _table(layers: list[dict[str, Any]], config: CrushConfig) -> Table:
    """One line for layers that do the same."""
    table = Table("layers", "sink", "important", "representative", "recent", "bytes a layer")
    start = 0
    for end in range(1, len(layers) + 1):
        same = end < len(layers) and all(
            layers[end][key] == layers[start][key] for key in layers[start] if key != "layer"
        )
        if same:
            continue
        first = layers[start]
        span = str(start) if end == start + 1 else f"{start}-{end - 1}"
        tokens = (str(first[tier]) for tier in ("sink", "important", "representative", "recent"))
        table.add_row(span, *tokens, size(first["nbytes"]))
        start = end
    bits = config.to_dict()
    representative = bits["representative_bits"] or bits["bits"]
    table.add_section()
    recent = str(bits["recent_bits"])
    table.add_row("bits a number", recent, str(bits["bits"]), str(representative), recent, "")
    return table
