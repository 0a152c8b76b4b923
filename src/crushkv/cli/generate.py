"""`crushkv generate`: one answer with a compressed cache, beside that of the full cache if asked for."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..config import CrushConfig
from ..errors import ConfigError
from .models import LoadedModel, load
from .options import Json, ModelOptions, PromptOptions, with_options
from .output import message_console, only_result_on_stdout, print_json, result_console, say, seconds, size
from .progress import Progress

if TYPE_CHECKING:
    from ..timing.measure import Measurement

ANSWER = "Answer"


@with_options()
def generate(
    *,
    prompt: PromptOptions,
    config: CrushConfig,
    max_new_tokens: Annotated[
        int, typer.Option(help="Length of the answer at most.", metavar="TOKENS", min=1, rich_help_panel=ANSWER)
    ] = 256,
    temperature: Annotated[
        float, typer.Option(help="0 always takes the likeliest token.", metavar="NUMBER", min=0, rich_help_panel=ANSWER)
    ] = 0.0,
    top_p: Annotated[
        float | None,
        typer.Option(
            help="Sample from the likeliest tokens whose probabilities sum to this.",
            metavar="SHARE",
            rich_help_panel=ANSWER,
        ),
    ] = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Answer with the full cache, too.", rich_help_panel=ANSWER)
    ] = False,
    as_json: Json = False,
    model: ModelOptions,
) -> None:
    """Answer a prompt with a compressed KV cache.

    The prompt is --prompt, --file, both (the file first), or standard input.
    """
    from ..prompts import encode
    from ..timing.measure import warm_up

    options = {"max_new_tokens": max_new_tokens, **_sampling(temperature, top_p), **model.generation}
    text = prompt.read()
    with only_result_on_stdout(as_json):
        loaded = load(model)
        ids = encode(loaded.tokenizer, text, prompt.chat, prompt.system)
        loaded.check_room(ids.shape[-1], max_new_tokens)
        warm_up(loaded.model, ids, config, tokens=16)
        full = None
        if compare:
            say("Answering with the full cache")
            full = _run(loaded, ids, None, config.seed, options)
            say("Answering with KVCrush")
        result = _run(loaded, ids, config, config.seed, options, stream=not compare and not as_json)
    if as_json:
        compared = {} if full is None else {"full": full[0], **_equality(result, full)}
        print_json({"command": "generate", **result[0], **compared, "config": config.to_dict(), **loaded.conditions()})
    elif full is not None:
        _print_comparison(result, full)
    else:
        _print_figures(result[0])


def _sampling(temperature: float, top_p: float | None) -> dict[str, Any]:
    if top_p is not None and not 0 < top_p <= 1:
        raise ConfigError(f"--top-p {top_p}: accepted is a number above 0 and up to 1")
    if temperature == 0:
        if top_p is not None:
            raise ConfigError(f"--top-p {top_p}: only with a --temperature above 0, which turns sampling on")
        return {"do_sample": False}
    sampling = {"do_sample": True, "temperature": temperature}
    return sampling if top_p is None else {**sampling, "top_p": top_p}


_Run = tuple[dict[str, Any], tuple[int, ...]]


def _run(
    loaded: LoadedModel, ids: Any, config: CrushConfig | None, seed: int, options: dict[str, Any], stream: bool = False
) -> _Run:
    """Figures and token ids of one run. `stream`: the answer is written to standard output while it is made."""
    from transformers import TextStreamer

    from ..timing.measure import measure

    shown = TextStreamer(loaded.tokenizer, skip_special_tokens=True) if stream else None
    with reading(loaded.model, ids.shape[-1], options.get("prefill_chunk_size")) as stop:

        def on_token(token: Any) -> None:
            stop()
            if shown is not None:
                shown.put(token)

        run = measure(loaded.model, ids, config, seed=seed, on_token=on_token, **options)
    if shown is not None:
        shown.end()
    return figures(run, loaded.tokenizer.decode(run.token_ids, skip_special_tokens=True)), run.token_ids


@contextlib.contextmanager
def reading(model: Any, tokens: int, chunk: int | None) -> Iterator[Callable[[], None]]:
    """Shows how many layers have read the prompt, until the function that it gives is called. Hooks count them."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    layers = list(getattr(decoder, "layers", None) or [decoder])
    passes = -(-tokens // chunk) if chunk else 1
    with Progress([1.0] * (len(layers) * passes), lines=False) as progress:
        progress.begin(f"Reading {tokens} tokens")
        hooks = [layer.register_forward_hook(lambda *_: progress.done()) for layer in layers]

        def stop() -> None:
            progress.close()
            while hooks:
                hooks.pop().remove()

        try:
            yield stop
        finally:
            stop()


def figures(run: Measurement, answer: str) -> dict[str, Any]:
    """The JSON form of one run. `tiers` are tokens per layer and KV head; None for the full cache."""
    report = run.report
    peak, before = run.peak_memory, run.memory_before
    return {
        "answer": answer,
        "prompt_tokens": run.prompt_tokens,
        "new_tokens": len(run.token_ids),
        "tokens_seen": run.tokens_seen,
        "tokens_held": run.tokens_seen if report is None else round(report.tokens_held, 3),
        "tiers": None if report is None else {name: round(count, 3) for name, count in report.tiers.items()},
        "untouched_rows": 0 if report is None else report.untouched_rows,
        "rope_layers": 0 if report is None else report.rope_layers,
        "widened_layers": {} if report is None else dict(report.widened_layers),
        "profile": None if report is None else report.profile,
        "kv_bytes": run.kv_bytes,
        "full_kv_bytes": run.full_kv_bytes,
        "bytes_fraction": run.bytes_fraction,
        "room_bytes": 0 if report is None else report.room_bytes,
        "state_bytes": 0 if report is None else report.state_bytes,
        "memory_bytes": run.memory_bytes,
        "ttft_seconds": run.ttft,
        "tpot_seconds": run.tpot,
        "peak_memory_bytes": peak,
        "memory_before_bytes": before,
        "peak_above_start_bytes": None if peak is None or before is None else peak - before,
    }


def rows(run: dict[str, Any]) -> dict[str, str]:
    """What a table shows of one run, or of a summary of several, by the name of the row."""
    tiers = run["tiers"] or {}
    return {
        "KV cache at 16 bits": f"{size(run['kv_bytes'])} ({run['bytes_fraction']:.1%})",
        "tokens per KV head": f"{run['tokens_held']:.0f} of {run['tokens_seen']:.0f}",
        **{
            f"  {name}": f"{tiers[name]:.0f}" if tiers else "-"
            for name in ("sink", "important", "representative", "recent")
        },
        "  room to grow": size(run["room_bytes"]),
        "  scores, positions": size(run["state_bytes"]),
        "  allocated in all": size(run["memory_bytes"]),
        "first token (TTFT)": _time(run, "ttft"),
        "token after it (TPOT)": _time(run, "tpot"),
        "peak memory": size(run["peak_memory_bytes"]),
        "  since the prompt": size(run["peak_above_start_bytes"]),
    }


def _time(run: dict[str, Any], name: str) -> str:
    """`17.2 s`, and the range where there is one: `17.2 s (16.9 s to 18.0 s)`."""
    text = seconds(run[f"{name}_seconds"])
    spread = run.get(f"{name}_range_seconds")
    return text if spread is None else f"{text} ({seconds(spread[0])} to {seconds(spread[1])})"


def _equality(result: _Run, full: _Run) -> dict[str, Any]:
    """Whether the answers are equal, and how many tokens they have in common before they part."""
    pairs = zip(result[1], full[1], strict=False)
    equal = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(result[1]), len(full[1])))
    return {"answers_equal": result[1] == full[1], "equal_tokens": equal}


def _print_figures(run: dict[str, Any]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for name, value in rows(run).items():
        table.add_row(Text(name, style="dim"), value)
    console = message_console()
    console.print()
    console.print(table)


def _print_comparison(result: _Run, full: _Run) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table("", "full cache", "KVCrush")
    table.columns[0].no_wrap = True
    table.add_row("answer", *(Text(run[0]["answer"].strip()) for run in (full, result)), end_section=True)
    left, right = rows(full[0]), rows(result[0])
    for name in left:
        table.add_row(name, left[name], right[name])
    console = result_console()
    console.print(table)
    equal = _equality(result, full)
    if equal["answers_equal"]:
        console.print(f"The answers are equal ({len(full[1])} tokens).")
    else:
        console.print(f"The answers part after {equal['equal_tokens']} equal tokens.")
