"""`crushkv profile`: measures a model once, for presets that give each part of a key its own bits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from ..errors import ConfigError
from .model_loader import ModelOptions, load
from .options import MODEL, with_options
from .output import check_folder, say, seconds, size


@with_options(model=MODEL)
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
    if output is not None:
        check_folder(output)
    loaded = load(replace(model, model=name or model.model), say)
    begin = time.perf_counter()
    made = profile_model(loaded.model, loaded.tokenizer, say)
    say(f"Measured in {seconds(time.perf_counter() - begin)}")
    if output is None:
        keep_profile(loaded.model, made, say)
        return
    made.save(output)
    layers, heads, channels = made.keys.shape
    say(f"{output} ({size(output.stat().st_size)}): {layers} layers, {heads} KV heads, {channels} channels")
