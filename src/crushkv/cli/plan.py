"""`crushkv plan`: what a cache will hold, before anything runs."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Annotated, Any

import typer
from rich.table import Table

from ..config import CrushConfig
from .doctor import key_lines, measured_keys
from .models import load_config
from .options import Json, with_options
from .output import print_json, result_console, size

NOT_LOADED = "`--load` or `crushkv doctor --model` measures it"


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
    load: Annotated[
        bool, typer.Option("--load", help="Load the model, too, and show how RoPE rotates its keys.")
    ] = False,
    as_json: Json = False,
    config: CrushConfig,
) -> None:
    """Show how a budget is split between the tiers, for a model and a prompt's length.

    Reads the model's configuration only. It does not say how RoPE rotates the keys; `--load` measures that. A number
    that is not quantized counts 16 bits.
    """
    from ..hf import plan_cache

    name, model_config = load_config(model)
    found = plan_cache(model_config, config, tokens)
    keys, unknown = measured_keys(model, tokens) if load else ([], NOT_LOADED)
    of_layer = keys or [{"rope": None, "keys": None}] * len(found.layers)
    layers = [
        {"layer": index, **dataclasses.asdict(split), **turned}
        for index, (split, turned) in enumerate(zip(found.layers, of_layer, strict=True))
    ]
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
                "rope_layers": sum(layer["rope"] is True for layer in layers) if keys else None,
                "keys_unknown": unknown,
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
    if not config.formats.raw:
        for line in key_lines(layers, unknown):
            console.print(line, highlight=False, markup=False)
    if found.other_layers:
        console.print(f"{found.other_layers} layers (sliding or recurrent ones) are left alone and not counted.")


def _table(layers: list[dict[str, Any]], config: CrushConfig) -> Table:
    """One line for layers that do the same."""
    table = Table("layers", "sink", "important", "representative", "recent", "bytes a layer")
    tiers = ("sink", "important", "representative", "recent")
    for shown, group in itertools.groupby(layers, lambda layer: [layer[name] for name in (*tiers, "nbytes")]):
        numbers = [layer["layer"] for layer in group]
        span = str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]}-{numbers[-1]}"
        *tokens, nbytes = shown
        table.add_row(span, *map(str, tokens), size(nbytes))
    bits = config.to_dict()
    representative = bits["representative_bits"] or bits["bits"]
    table.add_section()
    recent = str(bits["recent_bits"])
    table.add_row("bits a number", recent, str(bits["bits"]), str(representative), recent, "")
    return table
