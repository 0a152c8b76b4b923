"""`crushkv ask`: answers questions from the cache of a document that `crushkv build` has read."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from .conversation import Frame
from .model_loader import LoadedModel, ModelOptions, load
from .options import MODEL, with_options
from .output import only_result_on_stdout, print_json, result_console, say, seconds, versions
from .prompts import check_room


@with_options(model=MODEL)
def ask(
    cache: Annotated[Path, typer.Argument(help="A file that `crushkv build` has written.", metavar="CACHE")],
    questions: Annotated[list[str], typer.Argument(help="Each is answered on its own.", metavar="QUESTION...")],
    *,
    max_new_tokens: Annotated[int, typer.Option(help="Length of an answer at most.", metavar="TOKENS", min=1)] = 128,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
    model: ModelOptions,
) -> None:
    """Answer questions about a document from its cache, without reading it again.

    The model is the one that the cache was built with, unless --model names where it is.
    """
    from ..hf import load_cache
    from ..hf.saving import read_notes

    notes = read_notes(cache)
    if model.model is None:
        model = replace(model, model=notes.get("model"))
    with only_result_on_stdout() if as_json else contextlib.nullcontext():
        loaded = load(model, say)
        saved = load_cache(cache, loaded.model)
        answers = [_answer(loaded, saved, question, max_new_tokens) for question in questions]
    if as_json:
        print_json(
            {
                "command": "ask",
                "document": notes.get("document"),
                "answers": answers,
                "config": saved.config.to_dict(),
                "model": loaded.describe(),
                "versions": versions(),
            }
        )
        return
    table = Table("question", "answer", "first token")
    for answer in answers:
        table.add_row(Text(answer["question"]), Text(answer["answer"].strip()), seconds(answer["ttft"]))
    result_console().print(table)


def _answer(loaded: LoadedModel, saved: Any, question: str, max_new_tokens: int) -> dict[str, Any]:
    import torch

    from ..hf.interface import passed
    from ..hf.measure import TokenClock

    model = loaded.model
    asked = Frame.question_ids(loaded.tokenizer, question, saved.notes.get("after", ""))
    ids = torch.cat([saved.input_ids, asked], dim=1).to(model.device)
    check_room(ids.shape[1], max_new_tokens, model.config)
    clock = TokenClock(model.device)
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        **passed(saved.cache()),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        streamer=clock,
    )
    new = output[0, ids.shape[1] :]
    return {
        "question": question,
        "answer": loaded.tokenizer.decode(new, skip_special_tokens=True),
        "prompt_tokens": ids.shape[1],
        "new_tokens": len(new),
        "ttft": clock.ttft,
        "tpot": clock.tpot,
    }
