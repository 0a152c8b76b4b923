"""`crushkv build` reads a document once and keeps its cache as a file; `crushkv ask` answers questions from it."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from ..config import CrushConfig
from ..errors import ConfigError
from ..text import seconds, size
from .models import LoadedModel, load
from .options import ChatOptions, Json, ModelOptions, NewTokens, output_option, read_text, with_options
from .output import check_output, console, only_result_on_stdout, print_json, say

# The questions are not known yet, so no policy can tell which tokens they will need: each policy loses about as many
# answers as random eviction does, where 8 bits lose none (benchmarks/accuracy/blind.py). By default every token is kept
# in 8 bits. A policy that scores with the last queries would keep what the end of the document asks for.
UNASKED = {"budget": 1.0, "bits": 8, "policy": "expected_attention"}


@with_options(**UNASKED)
def build(
    document: Annotated[str, typer.Argument(help="A text file; - is standard input.", metavar="DOCUMENT")],
    *,
    output: Annotated[Path, output_option("The cache; a file of that name is replaced.")] = Path(
        "document.safetensors"
    ),
    chat: ChatOptions,
    config: CrushConfig,
    model: ModelOptions,
) -> None:
    """Read a document once, and keep its compressed cache as a file.

    `crushkv ask` answers questions from it without reading the document again. Every token is kept, in 8 bits, unless
    --budget says otherwise, because the questions are not known yet.
    """
    from ..hf import CrushCache, save_cache
    from ..prompts import frame, read_prompt

    check_output(output)
    text = read_text("DOCUMENT", document)
    if not text.strip():
        raise ConfigError(f"DOCUMENT {document!r}: the document is empty")
    loaded = load(model)
    framed = frame(loaded.tokenizer, text, chat.chat, chat.system)
    ids = framed.document_ids(loaded.tokenizer)
    loaded.check_room(ids.shape[1])
    say(f"Reading {ids.shape[1]} tokens")
    begin = time.perf_counter()
    cache = CrushCache(loaded.model, config)
    read_prompt(loaded.model, ids, cache, model.prefill_chunk_size)
    save_cache(output, cache, loaded.model, ids, {"document": document, "model": model.model, "after": framed.after})
    report = cache.report()
    say(f"Read in {seconds(time.perf_counter() - begin)}")
    say(
        f"{output} ({size(output.stat().st_size)}): {report.tokens_held:.0f} of {report.tokens_seen} tokens per layer "
        f"and KV head, {size(report.kv_bytes)} of keys and values instead of {size(report.full_kv_bytes)}"
    )


@with_options()
def ask(
    cache: Annotated[Path, typer.Argument(help="A file that `crushkv build` has written.", metavar="CACHE")],
    questions: Annotated[list[str], typer.Argument(help="Each question is answered alone.", metavar="QUESTION...")],
    *,
    max_new_tokens: NewTokens = 128,
    as_json: Json = False,
    model: ModelOptions,
) -> None:
    """Answer questions about a document from its cache, without reading it again.

    The model is the one that the cache was built with, unless --model names where it is.
    """
    from rich.table import Table
    from rich.text import Text

    from ..hf import load_cache
    from ..hf.saving import read_notes

    notes = read_notes(cache)
    if model.model is None:
        model = replace(model, model=notes.get("model"))
    with only_result_on_stdout(as_json):
        loaded = load(model)
        saved = load_cache(cache, loaded.model)
        answers = [_answer(loaded, saved, question, max_new_tokens) for question in questions]
    if as_json:
        found = {"document": notes.get("document"), "answers": answers, "config": saved.config.to_dict()}
        print_json({"command": "ask", **found, **loaded.conditions()})
        return
    table = Table("question", "answer", "first token")
    for answer in answers:
        table.add_row(Text(answer["question"]), Text(answer["answer"].strip()), seconds(answer["ttft_seconds"]))
    console().print(table)


def _answer(loaded: LoadedModel, saved: Any, question: str, max_new_tokens: int) -> dict[str, Any]:
    import torch

    from ..hf.interface import passed
    from ..prompts import Frame
    from ..timing.measure import measure

    asked = Frame.question_ids(loaded.tokenizer, question, saved.notes.get("after", ""))
    ids = torch.cat([saved.input_ids, asked], dim=1)
    loaded.check_room(ids.shape[1], max_new_tokens)
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": False, **passed(saved.cache())}
    return {"question": question, **loaded.figures(measure(loaded.model, ids, **options))}
