"""`crushkv bench`: time and memory of requests, by method and length of the prompt."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

from ..config import CrushConfig
from ..errors import ConfigError, one_line
from ..machine import device_name
from ..presets import PRESETS
from ..text import seconds, size
from .models import LoadedModel, load
from .options import Configs, ModelOptions, ResultOptions, option, with_options
from .output import Progress, check_output, console, only_result_on_stdout, plain_table, say

if TYPE_CHECKING:
    from ..timing import Figure, Record, Request, Spread


@dataclass(frozen=True)
class RequestOptions:
    """What is to be measured."""

    method: Configs = None
    tokens: Annotated[str, option("Lengths of the prompt, separated by commas.", "TOKENS,...")] = "1024,2048,4096"
    budgets: Annotated[str, option("Budgets of the methods that name none themselves.", "AMOUNT,...")] = "0.25"
    batch: Annotated[str, option("Batch sizes.", "ROWS,...")] = "1"
    new_tokens: Annotated[int, option("Tokens to generate in each row.", "TOKENS", min=2)] = 32
    repeats: Annotated[int, option("Rounds. Ratios are medians over them.", "NUMBER", min=1)] = 3

    def requests(self) -> list[Request]:
        """All requests, round by round. Each round measures the methods in another order.

        Raises:
            ConfigError: names the option, or the configuration.
        """
        from ..timing import Request, rotated

        methods = self._methods()
        lengths, batches = _integers("--tokens", self.tokens), _integers("--batch", self.batch)
        return [
            Request(tokens, rows, self.new_tokens, name, config, repeat)
            for repeat in range(self.repeats)
            for tokens in lengths
            for rows in batches
            for name, config in rotated(methods, repeat)
        ]

    def _methods(self) -> list[tuple[str, CrushConfig | None]]:
        """Each method with its name, and with each of the budgets unless it has one of its own."""
        from ..config_text import parse_configs, read_field

        amounts = [read_field("budget", amount.strip()) for amount in self.budgets.split(",")]
        methods: list[tuple[str, CrushConfig | None]] = []
        for name, config in parse_configs(self.method or ["full", "{snapkv,h2o}:representative_share=0.1"]).items():
            if config is None or "budget=" in name or name.partition(":")[0] in PRESETS:
                methods.append((name, config))
                continue
            for amount in amounts:
                # A share of the full cache has a column of its own. Tokens and bytes become a part of the name.
                told = "" if isinstance(amount, float) else f"{',' if ':' in name else ':'}budget={amount}"
                methods.append((name + told, config.replace(budget=amount)))
        return methods


def _integers(option: str, text: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise ConfigError(f"{option} {text!r}: accepted are integers of at least 1, separated by commas")
    return numbers


@with_options()
def bench(
    *,
    asked: RequestOptions,
    result: ResultOptions,
    plots: Annotated[Path | None, option("Write plots as PNG and SVG into this folder.", "DIR")] = None,
    show: Annotated[
        list[Path] | None, option("Measure nothing: show the results in this file. Repeatable.", "FILE")
    ] = None,
    model: ModelOptions,
) -> None:
    """Measure time and memory of requests, against the full cache.

    Methods take turns, so that a machine that is busy for a while is busy for all of them. Each ratio compares two
    requests of one round. Without --method: the full cache, and SnapKV and H2O with representatives.
    """
    from ..timing import read_records, summarize, write_record

    if plots is not None:
        try:
            import matplotlib  # noqa: F401
        except ImportError:
            raise ConfigError("--plots needs matplotlib: pip install 'crushkv[eval]'") from None
    if show:
        records = read_records(show)
    else:
        check_output(result.output)
        requests = asked.requests()
        with only_result_on_stdout(result.as_json), contextlib.ExitStack() as stack:
            loaded = load(model)
            for request in requests:
                loaded.check_room(request.tokens, request.new_tokens)
            file = None if result.output is None else stack.enter_context(result.output.open("w", encoding="utf-8"))
            records = _measure(loaded, requests, model.generation, file)
    figures = summarize(records)
    if result.as_json:
        for record in records:
            write_record(sys.stdout, record)
    else:
        _print(figures)
    if plots is not None:
        from ..timing.plots import plot, save

        say(", ".join(map(str, save(plot(figures), plots))))


def _measure(
    loaded: LoadedModel, requests: Sequence[Request], options: dict[str, Any], file: TextIO | None
) -> list[Record]:
    from ..timing import measure_request, repeated_prompt, write_record
    from ..timing.measure import warm_up

    if file is not None:
        print(json.dumps({"kind": "machine", **_machine(loaded)}), file=file, flush=True)
    records: list[Record] = []
    with Progress([float(r.batch * (r.tokens + 20 * r.new_tokens)) for r in requests]) as progress:
        progress.begin("warming up")
        short = repeated_prompt(loaded.tokenizer, 256)
        for config in {r.method: r.config for r in requests}.values():
            warm_up(loaded.model, short, config)
        prompts = {size: repeated_prompt(loaded.tokenizer, *size) for size in {(r.tokens, r.batch) for r in requests}}
        for request in requests:
            progress.begin(str(request))
            try:
                record = measure_request(loaded.model, prompts[request.tokens, request.batch], request, **options)
                told = f"TTFT {seconds(record.ttft_seconds)}, TPOT {seconds(record.tpot_seconds)}"
            except RuntimeError as error:  # most often, memory has run out: the record says so, and the next one begins
                told = one_line(str(error), limit=200)
                record = request.record(error=told)
            records.append(record)
            if file is not None:
                write_record(file, record)
            progress.done(f"{request}: {told}")
    return records


def _machine(loaded: LoadedModel) -> dict[str, Any]:
    """What a figure has to be read with."""
    import torch

    return {"device": device_name(loaded.model.device), "threads": torch.get_num_threads(), **loaded.conditions()}


def _print(figures: Sequence[Figure]) -> None:
    """Time and memory for each length and batch size, and remarks about the rows below them."""
    tables: tuple[tuple[tuple[str, Callable[[Figure], str]], ...], ...] = (
        (
            ("TTFT", lambda figure: _median(figure.ttft, seconds)),
            ("of full (range)", lambda figure: _ranged(figure.ttft_ratio, 2, "x")),
            ("TPOT", lambda figure: _median(figure.tpot, seconds)),
            ("of full (range)", lambda figure: _ranged(figure.tpot_ratio, 2, "x")),
        ),
        (
            ("KV cache", lambda figure: _median(figure.kv_bytes, size)),
            ("of full", lambda figure: _median(figure.kv_share, "{:.1%}".format)),
            ("peak MiB (range)", lambda figure: _ranged(figure.peak_above_start, 0, scale=2**20)),
            ("tokens/s", lambda figure: _median(figure.tokens_per_second, "{:.1f}".format)),
            ("own", lambda figure: f"{figure.own_share:.2%}" if figure.own_share else "-"),
        ),
    )
    shown = console()
    for tokens, batch in dict.fromkeys((figure.tokens, figure.batch) for figure in figures):
        found = [figure for figure in figures if (figure.tokens, figure.batch) == (tokens, batch)]
        shown.print(f"\n{tokens} tokens{'' if batch == 1 else f', batch of {batch}'}", style="bold")
        for columns in tables:
            table = plain_table("method", (name for name, _ in columns))
            for figure in found:
                table.add_row(figure.name, *(cell(figure) for _, cell in columns))
            shown.print(table)
        for figure in found:
            for remark in figure.remarks:
                shown.print(f"{figure.name}: {remark}", markup=False)
    shown.print("peak: the most memory in use during the request, less what was in use before it", style="dim")
    if any(figure.own_share for figure in figures):
        shown.print("own: signatures, distances and grouping, as a share of the whole request", style="dim")


def _median(spread: Spread | None, show: Callable[[float], str]) -> str:
    return "-" if spread is None else show(spread.median)


def _ranged(spread: Spread | None, digits: int, unit: str = "", scale: float = 1) -> str:
    """The median, and in brackets the range: `0.52x (0.50-0.55)`."""
    if spread is None:
        return "-"
    median, low, high = (f"{value / scale:.{digits}f}" for value in (spread.median, spread.low, spread.high))
    return f"{median}{unit} ({low}-{high})"
