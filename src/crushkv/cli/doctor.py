"""`crushkv doctor`: what is installed here, and what of crushkv runs on it."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from .models import load_config
from .options import with_options
from .output import print_json, result_console, size
from .system import examine


@with_options()
def doctor(
    *,
    model: Annotated[
        str | None,
        typer.Option(
            help="Hugging Face id or folder: show which of its layers are compressed.",
            metavar="MODEL",
            show_default=False,
        ),
    ] = None,
    tokens: Annotated[int, typer.Option(help="With --model: length of the prompt.", metavar="TOKENS", min=1)] = 4096,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Show what is installed here and what runs on it; of a model, which layers will be compressed and which not.

    Exit code 0 if crushkv is usable (and compresses the model), 1 if not.
    """
    found = examine()
    if model is not None:
        found["model"] = _examine_model(model, tokens)
    if as_json:
        print_json({"command": "doctor", **found})
    else:
        _print(found)
    if not found["usable"] or (model is not None and not found["model"]["supported"]):
        raise typer.Exit(1)


def _examine_model(model: str, tokens: int) -> dict[str, Any]:
    """Which layers are compressed, and what share of the cache's bytes they hold; or why the model is refused."""
    from ..errors import UnsupportedModelError
    from ..hf.planning import check_supported, layer_kinds

    name, config = load_config(model)
    try:
        check_supported(config)
        kinds = layer_kinds(config, tokens)
    except UnsupportedModelError as error:
        return {"name": name, "supported": False, "reason": str(error)}
    total = sum(kind.nbytes for kind in kinds)
    compressed = sum(kind.nbytes for kind in kinds if kind.compressed)
    return {
        "name": name,
        "supported": True,
        "tokens": tokens,
        "compressed_share": compressed / total,
        "full_kv_bytes": total,
        "layers": [{"layer": index, **dataclasses.asdict(kind)} for index, kind in enumerate(kinds)],
    }


def _model_lines(found: dict[str, Any]) -> Iterator[str]:
    """One line for layers that follow each other and are alike."""
    if not found["supported"]:
        yield f"not compressed: {found['reason']}"
        return
    for (compressed, reason), group in itertools.groupby(
        found["layers"], key=lambda layer: (layer["compressed"], layer["reason"])
    ):
        layers = [layer["layer"] for layer in group]
        span = f"layer {layers[0]}" if len(layers) == 1 else f"layers {layers[0]}-{layers[-1]}"
        yield f"{span}: {'compressed' if compressed else 'left alone'}, {reason}"
    yield (
        f"compressed layers hold {found['compressed_share']:.0%} of the full cache's {size(found['full_kv_bytes'])} "
        f"at {found['tokens']} tokens"
    )


def _print(found: dict[str, Any]) -> None:
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("versions", Text(_pairs(found["versions"])))
    table.add_row("optional", Text(_pairs(found["optional"])))
    for device in found["devices"]:
        memory = "" if device["memory_bytes"] is None else f", {size(device['memory_bytes'])}"
        table.add_row("device", Text(f"{device['device']}: {device['description']}{memory}"))
    memory = found["memory"]
    table.add_row("memory", f"{size(memory['available_bytes'])} free of {size(memory['total_bytes'])}")
    embedded = found["embedded_model"]
    table.add_row("embedded model", Text(embedded["folder"] if embedded["ready"] else embedded["advice"]))
    table.add_row("attention", Text(_yes_no(found["attention_implementations"])))
    table.add_row("features", Text(_yes_no(found["features"])))
    if "model" in found:
        table.add_row(Text(found["model"]["name"]), Text("\n".join(_model_lines(found["model"]))))
    for extra, names in found["missing"].items():
        if names:
            table.add_row(f"extra {extra}", Text(f"missing: {', '.join(names)} (pip install 'crushkv[{extra}]')"))
    for problem in found["problems"]:
        table.add_row("problem", Text(problem, style="red"))
    console = result_console()
    console.print(table)
    console.print("crushkv is usable here." if found["usable"] else "crushkv is not usable here.", style="bold")


def _pairs(versions: dict[str, str | None]) -> str:
    return ", ".join(f"{name} {version or 'not installed'}" for name, version in versions.items())


def _yes_no(flags: dict[str, bool]) -> str:
    return ", ".join(f"{name} {'yes' if flag else 'no'}" for name, flag in flags.items())
