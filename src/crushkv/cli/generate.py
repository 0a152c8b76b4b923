"""`crushkv generate`: one answer with a compressed cache, beside that of the full cache if asked for."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from ..config import CrushConfig
from ..errors import ConfigError
from .models import LoadedModel, load
from .options import Json, ModelOptions, PromptOptions, option, with_options
from .output import (
    Progress,
    add_figures,
    console,
    names_and_values,
    only_result_on_stdout,
    print_json,
    say,
)

if TYPE_CHECKING:
    from ..timing.measure import Measurement

_answer = functools.partial(option, panel="Answer")


@dataclass(frozen=True)
class AnswerOptions:
    """How an answer is made."""

    max_new_tokens: Annotated[int, _answer("Length of the answer at most.", "TOKENS", min=1)] = 256
    temperature: Annotated[float, _answer("0 takes the likeliest token.", "NUMBER", min=0)] = 0.0
    top_p: Annotated[float | None, _answer("Sample from the likeliest tokens of this mass.", "SHARE")] = None
    compare: Annotated[bool, _answer("Answer with the full cache, too.", None, "--compare")] = False

    @property
    def generation(self) -> dict[str, Any]:
        """As arguments of `generate`."""
        top_p, sampled = self.top_p, self.temperature > 0
        if top_p is not None and not 0 < top_p <= 1:
            raise ConfigError(f"--top-p {top_p}: accepted is a number above 0 and up to 1")
        if top_p is not None and not sampled:
            raise ConfigError(f"--top-p {top_p}: only with a --temperature above 0, which turns sampling on")
        options = {"temperature": self.temperature} if sampled else {}
        options |= {} if top_p is None else {"top_p": top_p}
        return {"max_new_tokens": self.max_new_tokens, "do_sample": sampled, **options}


@with_options()
def generate(
    *, prompt: PromptOptions, config: CrushConfig, answer: AnswerOptions, as_json: Json = False, model: ModelOptions
) -> None:
    """Answer a prompt with a compressed KV cache.

    The prompt is --prompt, --file, both (the file first), or standard input.
    """
    from ..prompts import encode
    from ..timing.figures import rows
    from ..timing.measure import warm_up

    options = {"seed": config.seed, **answer.generation, **model.generation}
    text = prompt.read()
    with only_result_on_stdout(as_json):
        loaded = load(model)
        ids = encode(loaded.tokenizer, text, prompt.chat, prompt.system)
        loaded.check_room(ids.shape[-1], answer.max_new_tokens)
        warm_up(loaded.model, ids, config, tokens=16)
        full = None
        if answer.compare:
            say("Answering with the full cache")
            full = _run(loaded, ids, None, options)
            say("Answering with KVCrush")
        run = _run(loaded, ids, config, options, stream=not answer.compare and not as_json)
    figures = loaded.figures(run)
    if as_json:
        compared = {} if full is None else {"full": loaded.figures(full), **_equality(run, full)}
        print_json({"command": "generate", **figures, **compared, "config": config.to_dict(), **loaded.conditions()})
    elif full is None:
        console(messages=True).print("", names_and_values(rows(figures).items(), "dim"), sep="\n")
    else:
        _print_comparison([loaded.figures(full), figures], **_equality(run, full))


def _run(loaded: LoadedModel, ids: Any, config: CrushConfig | None, options: Any, stream: bool = False) -> Measurement:
    """Generates once. `stream`: the answer is written to standard output while it is made."""
    from transformers import TextStreamer

    from ..timing.measure import measure

    shown = TextStreamer(loaded.tokenizer, skip_special_tokens=True) if stream else None
    with reading(loaded.model, ids.shape[-1], options.get("prefill_chunk_size")) as stop:

        def on_token(token: Any) -> None:
            stop()
            if shown is not None:
                shown.put(token)

        run = measure(loaded.model, ids, config, on_token=on_token, **options)
    if shown is not None:
        shown.end()
    return run


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


def _equality(run: Measurement, full: Measurement) -> dict[str, Any]:
    """Whether the answers are equal, and how many tokens they have in common before they part."""
    ours, theirs = run.token_ids, full.token_ids
    pairs = zip(ours, theirs, strict=False)
    equal = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(ours), len(theirs)))
    return {"answers_equal": ours == theirs, "equal_tokens": equal}


def _print_comparison(runs: list[dict[str, Any]], answers_equal: bool, equal_tokens: int) -> None:
    """`runs`: the full cache's and KVCrush's."""
    from rich.table import Table
    from rich.text import Text

    table = Table("", "full cache", "KVCrush")
    table.add_row("answer", *(Text(run["answer"].strip()) for run in runs), end_section=True)
    add_figures(table, runs)
    said = f"are equal ({equal_tokens} tokens)" if answers_equal else f"part after {equal_tokens} equal tokens"
    console().print(table, f"The answers {said}.", sep="\n")
