"""`crushkv run`: the main job. Questions over a document, answered from the full cache and from a compressed one."""

from __future__ import annotations

import contextlib
from typing import Annotated, Any

import typer

from ..config import CrushConfig
from .config_options import CONFIG
from .model_loader import ModelOptions, load
from .options import MODEL, with_options
from .output import only_result_on_stdout, print_json, say


@with_options(config=CONFIG, model=MODEL)
def run(
    *,
    questions: Annotated[int, typer.Option(help="How many of the bundled questions.", metavar="NUMBER", min=1)] = 3,
    max_new_tokens: Annotated[int, typer.Option(help="Length of an answer at most.", metavar="TOKENS", min=1)] = 32,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
    config: CrushConfig,
    model: ModelOptions,
) -> None:
    """Answer questions over a document, with the full cache and with KVCrush, and compare.

    The document and the questions come with the package.
    """
    from .comparison import Comparison
    from .questions import load_questions

    asked = load_questions(questions)
    with only_result_on_stdout() if as_json else contextlib.nullcontext():
        loaded = load(model, say)
        options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": False}
        if model.prefill_chunk_size is not None:
            options["prefill_chunk_size"] = model.prefill_chunk_size
        comparison = Comparison(loaded, config, options)
        comparison.answer(asked)
    if as_json:
        print_json({"command": "run", **comparison.to_dict()})
    else:
        comparison.show()
