"""`crushkv generate`: one answer with a compressed cache, beside that of the full cache where asked for."""

from __future__ import annotations

import contextlib
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from ..config import CrushConfig
from ..errors import ConfigError
from .config_options import CONFIG
from .figures import figures, rows
from .model_loader import LoadedModel, ModelOptions, load
from .options import MODEL, with_options
from .output import message_console, only_result_on_stdout, print_json, result_console, say, versions
from .prompt_options import PROMPT, PromptOptions
from .prompts import check_room

ANSWER = "Answer"


@with_options(prompt=PROMPT, config=CONFIG, model=MODEL)
def generate(
    *,
    max_new_tokens: Annotated[
        int, typer.Option(help="Length of the answer at most.", metavar="TOKENS", min=1, rich_help_panel=ANSWER)
    ] = 256,
    temperature: Annotated[
        float, typer.Option(help="0 takes the likeliest token.", metavar="NUMBER", min=0, rich_help_panel=ANSWER)
    ] = 0.0,
    top_p: Annotated[
        float | None,
        typer.Option(help="Sample from the likeliest tokens of this mass.", metavar="SHARE", rich_help_panel=ANSWER),
    ] = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Answer with the full cache, too.", rich_help_panel=ANSWER)
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.", rich_help_panel=ANSWER)] = False,
    prompt: PromptOptions,
    config: CrushConfig,
    model: ModelOptions,
) -> None:
    """Answer a prompt with a compressed KV cache.

    The prompt is --prompt, --file, both (the file first), or standard input.
    """
    options = {"max_new_tokens": max_new_tokens, **_sampling(temperature, top_p)}
    if model.prefill_chunk_size is not None:
        options["prefill_chunk_size"] = model.prefill_chunk_size
    text = prompt.read()
    with only_result_on_stdout() if as_json else contextlib.nullcontext():
        loaded = load(model, say)
        input_ids = prompt.encode(loaded.tokenizer, text)
        check_room(input_ids.shape[-1], max_new_tokens, loaded.model.config)
        _warm_up(loaded, input_ids, config)
        full = None
        if compare:
            say("Answering with the full cache")
            full = _run(loaded, input_ids, None, config.seed, options, stream=False)
            say("Answering with KVCrush")
        result = _run(loaded, input_ids, config, config.seed, options, stream=not compare and not as_json)
    if as_json:
        print_json(_json(result, full, config, loaded))
    elif full is not None:
        _print_comparison(result, full)
    else:
        _print_figures(result)


def _sampling(temperature: float, top_p: float | None) -> dict[str, Any]:
    if top_p is not None and not 0 < top_p <= 1:
        raise ConfigError(f"--top-p {top_p}: accepted is a number above 0 and up to 1")
    if temperature == 0:
        if top_p is not None:
            raise ConfigError(f"--top-p {top_p}: only with a --temperature above 0, which turns sampling on")
        return {"do_sample": False}
    sampling = {"do_sample": True, "temperature": temperature}
    return sampling if top_p is None else {**sampling, "top_p": top_p}


def _warm_up(loaded: LoadedModel, input_ids: Any, config: CrushConfig) -> None:
    from ..hf.measure import warm_up

    warm_up(loaded.model, input_ids, config, tokens=16)


def _run(
    loaded: LoadedModel,
    input_ids: Any,
    config: CrushConfig | None,
    seed: int,
    options: dict[str, Any],
    stream: bool,
) -> tuple[dict[str, Any], tuple[int, ...]]:
    """Figures and token ids of one run."""
    from transformers import TextStreamer

    from ..hf.measure import measure

    tokenizer = loaded.tokenizer
    shown = TextStreamer(tokenizer, skip_special_tokens=True) if stream else None
    run = measure(
        loaded.model, input_ids, config, seed=seed, on_token=shown.put if shown is not None else None, **options
    )
    if shown is not None:
        shown.end()
    answer = tokenizer.decode(run.token_ids, skip_special_tokens=True)
    return figures(run, answer), run.token_ids


_Run = tuple[dict[str, Any], tuple[int, ...]]


def _json(result: _Run, full: _Run | None, config: CrushConfig, loaded: LoadedModel) -> dict[str, Any]:
    value = {"command": "generate", **result[0]}
    if full is not None:
        value |= {"full": full[0], "answers_equal": result[1] == full[1], "equal_tokens": _equal_tokens(result, full)}
    return {**value, "config": config.to_dict(), "model": loaded.describe(), "versions": versions()}


def _equal_tokens(result: _Run, full: _Run) -> int:
    """How many tokens the answers have in common before they part."""
    pairs = zip(result[1], full[1], strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(result[1]), len(full[1])))


def _print_figures(result: _Run) -> None:
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for name, value in rows(result[0]).items():
        table.add_row(Text(name, style="dim"), value)
    console = message_console()
    console.print()
    console.print(table)


def _print_comparison(result: _Run, full: _Run) -> None:
    table = Table("", "full cache", "KVCrush")
    table.columns[0].no_wrap = True
    table.add_row("answer", Text(full[0]["answer"].strip()), Text(result[0]["answer"].strip()), end_section=True)
    left, right = rows(full[0]), rows(result[0])
    for name in left:
        table.add_row(name, left[name], right[name])
    console = result_console()
    console.print(table)
    if result[1] == full[1]:
        console.print(f"The answers are equal ({len(full[1])} tokens).")
    else:
        console.print(f"The answers part after equal tokens: {_equal_tokens(result, full)}.")
