"""`crushkv run`: answers questions over a document with the full cache and with smaller ones, and compares them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..demo import Question, load_questions
from .generate import figures, rows
from .models import LoadedModel, load
from .options import Configs, Json, ModelOptions, with_options
from .output import only_result_on_stdout, print_json, result_console, say
from .progress import Progress

if TYPE_CHECKING:
    from ..config import CrushConfig

FULL = "full"
PUBLISHED = "snapkv:budget=0.25,page_size=1,representative_share=0.1"  # KVCrush as its paper has it, with SnapKV
NAMES = {FULL: "full cache", PUBLISHED: "KVCrush as published"}
Runs = Mapping[str, dict[str, Any]]


@with_options()
def run(
    *,
    configs: Configs = None,
    questions: Annotated[int, typer.Option(help="How many of the bundled questions.", metavar="NUMBER", min=1)] = 3,
    max_new_tokens: Annotated[int, typer.Option(help="Length of an answer at most.", metavar="TOKENS", min=1)] = 32,
    as_json: Json = False,
    model: ModelOptions,
) -> None:
    """Answer questions over a document with the full cache, a preset, and KVCrush as published, and compare.

    The document and the questions come with the package. --config names other caches to compare with the full one.
    """
    from ..config_text import parse_configs

    methods = {FULL: None, **parse_configs(configs or ["balanced", PUBLISHED])}
    asked = load_questions(questions)
    with only_result_on_stdout(as_json):
        loaded = load(model)
        options = {"max_new_tokens": max_new_tokens, "do_sample": False, **model.generation}
        answered = _answer(loaded, methods, asked, options)
    summary = {name: _summary([runs[name] for runs in answered]) for name in methods}
    if as_json:
        print_json(
            {
                "command": "run",
                "questions": [
                    {"question": question.question, "expected": question.answer, "runs": runs}
                    for question, runs in zip(asked, answered, strict=True)
                ],
                "summary": summary,
                "options": options,
                "configs": {name: None if config is None else config.to_dict() for name, config in methods.items()},
                **loaded.conditions(),
            }
        )
    else:
        _print(asked, answered, summary)


def _answer(
    loaded: LoadedModel,
    methods: Mapping[str, CrushConfig | None],
    questions: Sequence[Question],
    options: dict[str, Any],
) -> list[Runs]:
    """The figures of each question with each method. A prompt that is too long is refused before anything runs."""
    from ..prompts import encode
    from ..timing import rotated
    from ..timing.measure import measure, warm_up

    prompts = [encode(loaded.tokenizer, question.prompt) for question in questions]
    for ids in prompts:
        loaded.check_room(ids.shape[-1], options["max_new_tokens"])
    answered: list[Runs] = []
    with Progress([1.0] * (len(questions) * len(methods))) as progress:
        progress.begin("Warming up")
        for config in methods.values():
            warm_up(loaded.model, prompts[0], config)
        for number, (question, ids) in enumerate(zip(questions, prompts, strict=True)):
            runs = {}
            # Each question begins with another method, so that none of them always has the warmest machine.
            for name in rotated(list(methods), number):
                text = f"question {number + 1}, {_title(name)}"
                progress.begin(f"{text}: {ids.shape[-1]} tokens")
                begin = time.perf_counter()
                made = measure(loaded.model, ids, methods[name], **options)
                answer = loaded.tokenizer.decode(made.token_ids, skip_special_tokens=True).strip()
                runs[name] = {**figures(made, answer), "correct": question.is_answered_by(answer)}
                progress.done(f"{text}: {time.perf_counter() - begin:.1f} s")
            answered.append(runs)
    return answered


def _title(name: str) -> str:
    return NAMES.get(name, name)


_MEDIANS = (
    "kv_bytes",
    "full_kv_bytes",
    "bytes_fraction",
    "room_bytes",
    "state_bytes",
    "memory_bytes",
    "tokens_seen",
    "tokens_held",
    "ttft_seconds",
    "tpot_seconds",
)


def _summary(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of one method: correct answers, medians of bytes and times over the questions, the highest memory peaks."""

    def values(name: str) -> list[float]:
        return [run[name] for run in runs if run[name] is not None]

    tiers = runs[0]["tiers"]
    return {
        "correct": sum(run["correct"] for run in runs),
        "questions": len(runs),
        **{name: statistics.median(values(name)) if values(name) else None for name in _MEDIANS},
        "tiers": tiers and {tier: statistics.fmean(run["tiers"][tier] for run in runs) for tier in tiers},
        **{
            f"{name}_range_seconds": [min(found), max(found)] if (found := values(f"{name}_seconds")) else None
            for name in ("ttft", "tpot")
        },
        **{name: max(values(name), default=None) for name in ("peak_memory_bytes", "peak_above_start_bytes")},
    }


def _print(questions: Sequence[Question], answered: Sequence[Runs], summary: Runs) -> None:
    """Answers side by side, and figures side by side."""
    from rich.table import Table
    from rich.text import Text

    titles = [_title(name) for name in summary]
    answers = Table("question", *titles, title="Answers", title_justify="left", show_lines=True)
    for question, runs in zip(questions, answered, strict=True):
        cells = [
            Text.assemble(("correct: ", "green") if runs[name]["correct"] else ("wrong: ", "red"), runs[name]["answer"])
            for name in summary
        ]
        answers.add_row(Text.assemble(question.question, "\n", (f"({question.answer})", "dim")), *cells)
    table = Table("", *titles, title="Figures (medians; the highest of the peaks)", title_justify="left")
    table.columns[0].no_wrap = True
    table.add_row("correct answers", *(f"{run['correct']} of {run['questions']}" for run in summary.values()))
    shown = [rows(run) for run in summary.values()]
    for name in shown[0]:
        table.add_row(name, *(row[name] for row in shown))
    console = result_console()
    console.print()
    console.print(answers)
    console.print(table)
    say("The questions show that the caches work. They are too few to measure how accurate they are.")
