"""`crushkv doctor`: what is installed here, and what of crushkv runs on it."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from .models import ModelError, load_config, load_local
from .options import Json, with_options
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
    as_json: Json = False,
) -> None:
    """Show what is installed here, and which layers of a model will be compressed.

    If the model's weights are on this machine, they are loaded to see how RoPE rotates the keys of each layer.

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
    keys, unknown = measured_keys(model, tokens)
    none: dict[str, Any] = {"rope": None, "keys": None}
    of_layer = iter(keys or itertools.repeat(none))
    return {
        "name": name,
        "supported": True,
        "tokens": tokens,
        "compressed_share": compressed / total,
        "full_kv_bytes": total,
        "keys_unknown": unknown,
        "layers": [
            {"layer": index, **dataclasses.asdict(kind), **(next(of_layer) if kind.compressed else none)}
            for index, kind in enumerate(kinds)
        ],
    }


def measured_keys(model: str | None, tokens: int) -> tuple[list[dict[str, Any]], str | None]:
    """How each compressed layer turns its keys, measured from the model: whether RoPE was found, and words.

    No layer, and the reason, where the weights are not on this machine or cannot be loaded.
    """
    from ..hf.rope import examine_ropes
    from ..hf.support import is_latent, position_limit

    try:
        loaded = load_local(model)
    except ModelError as error:
        return [], str(error)
    limit = position_limit(loaded.config)
    findings = examine_ropes(loaded, tokens if limit is None else min(tokens, limit))
    if is_latent(loaded.config):
        return [{"rope": None, "keys": "latents (MLA), held in the model's dtype only"} for _ in findings], None
    return [{"rope": found.rope is not None, "keys": found.text} for found in findings], None


def key_lines(layers: Iterable[dict[str, Any]], unknown: str | None) -> Iterator[str]:
    """One line for layers that follow each other and turn their keys alike.

    Args:
        layers: the compressed ones, with their number and what `measured_keys` gives.
        unknown: why that gives nothing.
    """
    if unknown is not None:
        yield f"keys: how RoPE turns them is known once the model is loaded; {unknown}"
        return
    held = {
        True: "; few bits hold them less their mean before RoPE",
        False: "; few bits hold them less their plain mean",
    }
    for (rope, text), group in itertools.groupby(layers, key=lambda layer: (layer["rope"], layer["keys"])):
        yield f"keys of {_span([layer['layer'] for layer in group])}: {text}{held.get(rope, '')}"


def _span(layers: list[int]) -> str:
    """`layer 3`, `layers 0-5`, `layers 1, 3, 5-7`."""
    runs = [list(run) for _, run in itertools.groupby(enumerate(layers), key=lambda pair: pair[1] - pair[0])]
    spans = [str(run[0][1]) if len(run) == 1 else f"{run[0][1]}-{run[-1][1]}" for run in runs]
    return f"layer{'s' * (len(layers) > 1)} {', '.join(spans)}"


def _model_lines(found: dict[str, Any]) -> Iterator[str]:
    """One line for layers that follow each other and are alike."""
    if not found["supported"]:
        yield f"not compressed: {found['reason']}"
        return
    for (compressed, reason), group in itertools.groupby(
        found["layers"], key=lambda layer: (layer["compressed"], layer["reason"])
    ):
        span = _span([layer["layer"] for layer in group])
        yield f"{span}: {'compressed' if compressed else 'left alone'}, {reason}"
    yield from key_lines((layer for layer in found["layers"] if layer["compressed"]), found["keys_unknown"])
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
    table.add_row("kernels", Text(found["kernels"]["text"]))
    table.add_row("features", Text(_yes_no(found["features"])))
    plugin = found["vllm_plugin"]
    if found["optional"]["vllm"] or not plugin["loaded"]:
        table.add_row("vLLM plugin", Text(plugin["text"], style="" if plugin["loaded"] else "red"))
    if "model" in found:
        table.add_row("model", Text("\n".join([found["model"]["name"], *_model_lines(found["model"])])))
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
