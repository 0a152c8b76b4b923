"""`crushkv build`: reads a document once, and keeps its compressed cache as a file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..config import CrushConfig
from .config_options import config_group
from .conversation import frame
from .model_loader import ModelOptions, load
from .options import MODEL, with_options
from .output import check_folder, say, seconds, size
from .prompts import check_room, read_prompt

# The questions are not known yet. Whatever is evicted now is evicted blind, and so far every policy loses about as many
# answers by that as chance does (benchmarks/accuracy/blind.py), where 8 bits lose nothing: by default every token is
# kept, in 8 bits. A policy that scores with the last tokens' queries would keep what the end of the document asks for.
BLIND = {"budget": 1.0, "bits": 8, "policy": "expected_attention"}


@with_options(config=config_group(**BLIND), model=MODEL)
def build(
    document: Annotated[str, typer.Argument(help="A text file; - is standard input.", metavar="DOCUMENT")],
    *,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The cache; a file of that name is replaced.", metavar="FILE")
    ] = Path("document.safetensors"),
    chat: Annotated[
        bool | None,
        typer.Option("--chat/--no-chat", help="Use the chat template.", show_default="where there is one"),
    ] = None,
    system: Annotated[str | None, typer.Option(help="System message.", metavar="TEXT")] = None,
    config: CrushConfig,
    model: ModelOptions,
) -> None:
    """Read a document once, and keep its compressed cache as a file.

    `crushkv ask` answers questions from it, in other processes, without reading the document again. Every token is
    kept, in 8 bits, unless --budget says otherwise: the questions are not known yet, and what is evicted cannot answer
    them.
    """
    import time

    import torch

    from ..hf import CrushCache, save_cache
    from ..hf.interface import passed

    check_folder(output)
    text = read_prompt(None, document)
    loaded = load(model, say)
    framed = frame(loaded.tokenizer, text, chat, system)
    ids = framed.document_ids(loaded.tokenizer)
    check_room(ids.shape[1], 0, loaded.model.config)
    say(f"Reading {ids.shape[1]} tokens")
    begin = time.perf_counter()
    cache = CrushCache(loaded.model, config)
    cache.prefill_end = ids.shape[1]
    with torch.no_grad():
        for part in ids.to(loaded.model.device).split(model.prefill_chunk_size or ids.shape[1], dim=1):
            loaded.model(input_ids=part, **passed(cache), logits_to_keep=1)
    cache.prefill_end = None
    notes = {"document": document, "model": model.model, "after": framed.after}
    save_cache(output, cache, loaded.model, ids, notes)
    report = cache.report()
    say(f"Read in {seconds(time.perf_counter() - begin)}")
    say(
        f"{output} ({size(output.stat().st_size)}): {report.tokens_held:.0f} of {report.tokens_seen} tokens per layer "
        f"and KV head, {size(report.kv_bytes)} of keys and values instead of {size(report.full_kv_bytes)}"
    )
