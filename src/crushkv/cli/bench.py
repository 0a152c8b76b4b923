"""`crushkv bench`: time and memory of requests, by method and length of the prompt."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

from ..config import CrushConfig
from ..errors import ConfigError, one_line
from .model_loader import LoadedModel, ModelOptions, load
from .options import MODEL, with_options
from .output import check_folder, only_result_on_stdout, say, seconds, versions
from .prompts import check_room
from .work_progress import WorkProgress

if TYPE_CHECKING:
    from ..benchmark import Record

METHODS = ("full", "{snapkv,h2o}:representative_share=0.1")


@dataclass(frozen=True)
class _Request:
    """What is to be measured."""

    method: str
    config: CrushConfig | None
    tokens: int
    batch: int
    repeat: int

    @property
    def text(self) -> str:
        from ..benchmark import label, share

        return f"{self.tokens} tokens, batch of {self.batch}, {label(self.method, share(self.config))}"

    def failed(self, new_tokens: int, error: str) -> Record:
        from ..benchmark import ENGINE, Record, share

        return Record(
            engine=ENGINE,
            method=self.method,
            budget=share(self.config),
            tokens=self.tokens,
            batch=self.batch,
            new_tokens=new_tokens,
            repeat=self.repeat,
            error=error,
        )


@with_options(model=MODEL)
def bench(
    *,
    tokens: Annotated[
        str, typer.Option(help="Lengths of the prompt, separated by commas.", metavar="TOKENS,...")
    ] = "1024,2048,4096",
    budgets: Annotated[
        str, typer.Option(help="Budgets of the methods that name none themselves.", metavar="AMOUNT,...")
    ] = "0.25",
    batch: Annotated[str, typer.Option(help="Batch sizes.", metavar="ROWS,...")] = "1",
    new_tokens: Annotated[int, typer.Option(help="Tokens to generate in each row.", metavar="TOKENS", min=2)] = 32,
    repeats: Annotated[int, typer.Option(help="Rounds. Ratios are medians over them.", metavar="NUMBER", min=1)] = 3,
    method: Annotated[
        list[str] | None,
        typer.Option(
            help="full, a preset, or POLICY:FIELD=VALUE,... Repeatable; {a,b} stands for both.",
            metavar="TEXT",
            show_default="full, and SnapKV and H2O with representatives",
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write every request as a JSON line.", metavar="FILE")
    ] = None,
    plots: Annotated[
        Path | None, typer.Option(help="Write plots as PNG and SVG into this folder.", metavar="DIR")
    ] = None,
    show: Annotated[
        list[Path] | None,
        typer.Option(help="Measure nothing: show the results in this file. Repeatable.", metavar="FILE"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a request, and no table.")] = False,
    model: ModelOptions,
) -> None:
    """Measure time and memory of requests, against the full cache.

    Methods take turns, so that a machine that is busy for a while is busy for all of them. Ratios are those of one
    round.
    """
    from ..benchmark import read_records

    if plots is not None:
        _need_matplotlib()
    if show:
        records = read_records(show)
    else:
        if output is not None:
            check_folder(output)
        methods = _methods(method or list(METHODS), budgets)
        rounds = _requests(methods, _integers("--tokens", tokens), _integers("--batch", batch), repeats)
        with only_result_on_stdout() if as_json else contextlib.nullcontext():
            loaded = load(model, say)
            for request in rounds:
                check_room(request.tokens, new_tokens, loaded.model.config)
            options = {} if model.prefill_chunk_size is None else {"prefill_chunk_size": model.prefill_chunk_size}
            with contextlib.ExitStack() as stack:
                file = None if output is None else stack.enter_context(output.open("w", encoding="utf-8"))
                records = _measure(loaded, rounds, new_tokens, options, file)
    _present(records, as_json, plots)


def _methods(texts: Sequence[str], budgets: str) -> list[tuple[str, CrushConfig | None]]:
    """Each method by its name, with each of the budgets unless it names one."""
    from ..config_text import expand, parse_config, read_field
    from ..presets import PRESETS

    amounts = [read_field("budget", amount.strip()) for amount in budgets.split(",")]
    methods: list[tuple[str, CrushConfig | None]] = []
    for name in dict.fromkeys(name for text in texts for name in expand(text)):
        config = parse_config(name)
        if config is None or "budget=" in name or name.partition(":")[0] in PRESETS:
            methods.append((name, config))
            continue
        for amount in amounts:
            # Shares of the full cache have a column of their own; tokens and bytes are told in the name.
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


def _requests(
    methods: Sequence[tuple[str, CrushConfig | None]], lengths: Sequence[int], batches: Sequence[int], repeats: int
) -> list[_Request]:
    """Round by round; within a round the methods of one length follow each other, first another one each time."""
    from ..benchmark import rotated

    return [
        _Request(*made, tokens, rows, repeat)
        for repeat in range(repeats)
        for tokens in lengths
        for rows in batches
        for made in rotated(methods, repeat)
    ]


def _measure(
    loaded: LoadedModel, requests: Sequence[_Request], new_tokens: int, options: dict[str, Any], file: TextIO | None
) -> list[Record]:
    import json

    from ..benchmark import measure_request, repeated_prompt, write_record
    from ..hf.measure import warm_up

    if file is not None:
        print(json.dumps({"kind": "machine", **machine(loaded)}), file=file, flush=True)
    records: list[Record] = []
    with WorkProgress([float(r.batch * (r.tokens + 20 * new_tokens)) for r in requests]) as progress:
        progress.begin("warming up")
        short = repeated_prompt(loaded.tokenizer, 256)
        for config in {r.method: r.config for r in requests}.values():
            warm_up(loaded.model, short, config)
        sizes = {(r.tokens, r.batch) for r in requests}
        prompts = {size: repeated_prompt(loaded.tokenizer, *size) for size in sizes}
        for request in requests:
            progress.begin(request.text)
            prompt = prompts[request.tokens, request.batch]
            try:
                record = measure_request(
                    loaded.model, prompt, new_tokens, request.config, request.method, request.repeat, **options
                )
                told = f"TTFT {seconds(record.ttft_seconds)}, TPOT {seconds(record.tpot_seconds)}"
            except RuntimeError as error:  # out of memory, most often: a row that says so, and the next
                told = one_line(str(error), limit=200)
                record = request.failed(new_tokens, told)
            records.append(record)
            if file is not None:
                write_record(file, record)
            progress.done(f"{request.text}: {told}")
    return records


def machine(loaded: LoadedModel) -> dict[str, Any]:
    """What a figure has to be read with."""
    import torch

    from .system import processor

    device = loaded.model.device
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else processor(),
        "threads": torch.get_num_threads(),
        "model": loaded.describe(),
        "versions": versions(),
    }


def _present(records: Sequence[Record], as_json: bool, plots: Path | None) -> None:
    from ..benchmark import summarize, write_record
    from .bench_table import show

    figures = summarize(records)
    if as_json:
        for record in records:
            write_record(sys.stdout, record)
    else:
        show(figures)
    if plots is not None:
        from ..benchmark.plots import plot, save

        say(", ".join(map(str, save(plot(figures), plots))))


def _need_matplotlib() -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ConfigError("--plots needs matplotlib: pip install 'crushkv[eval]'") from None
