"""`crushkv run`: answers questions over a document with the full cache and with smaller ones, and compares them."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

from ..demo import Question, load_questions
from .models import LoadedModel, load
from .options import Configs, Json, ModelOptions, NewTokens, option, with_options
from .output import Progress, add_figures, console, only_result_on_stdout, print_json, say

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
    questions: Annotated[int, option("How many of the bundled questions.", "NUMBER", min=1)] = 3,
    max_new_tokens: NewTokens = 32,
    as_json: Json = False,
    model: ModelOptions,
) -> None:
    """Answer questions over a document with the full cache, a preset, and KVCrush as published, and compare.

    The document and the questions come with the package. --config names other caches to compare with the full one.
    """
    from ..config_text import parse_configs
    from ..timing.figures import joined

    methods = {FULL: None, **parse_configs(configs or ["balanced", PUBLISHED])}
    asked = load_questions(questions)
    options = {"max_new_tokens": max_new_tokens, "do_sample": False, **model.generation}
    with only_result_on_stdout(as_json):
        loaded = load(model)
        answered = _answer(loaded, methods, asked, options)
    summary = {}
    for name in methods:
        runs = [found[name] for found in answered]
        correct = sum(run["correct"] for run in runs)
        summary[name] = {"correct": correct, "questions": len(runs), **joined(runs)}
    if not as_json:
        _print(asked, answered, summary)
        return
    pairs = zip(asked, answered, strict=True)
    found = [{"question": asked.question, "expected": asked.answer, "runs": runs} for asked, runs in pairs]
    configurations = {name: None if config is None else config.to_dict() for name, config in methods.items()}
    result = {"questions": found, "summary": summary, "options": options, "configs": configurations}
    print_json({"command": "run", **result, **loaded.conditions()})


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
                text = f"question {number + 1}, {NAMES.get(name, name)}"
                progress.begin(f"{text}: {ids.shape[-1]} tokens")
                begin = time.perf_counter()
                figures = loaded.figures(measure(loaded.model, ids, methods[name], **options))
                answer = figures["answer"].strip()
                runs[name] = {**figures, "answer": answer, "correct": question.is_answered_by(answer)}
                progress.done(f"{text}: {time.perf_counter() - begin:.1f} s")
            answered.append(runs)
    return answered


def _print(questions: Sequence[Question], answered: Sequence[Runs], summary: Runs) -> None:
    """Answers side by side, and figures side by side."""
    from rich.table import Table
    from rich.text import Text

    titles = [NAMES.get(name, name) for name in summary]
    answers = Table("question", *titles, title="Answers", title_justify="left", show_lines=True)
    for question, runs in zip(questions, answered, strict=True):
        verdicts = [("correct: ", "green") if runs[name]["correct"] else ("wrong: ", "red") for name in summary]
        cells = [Text.assemble(verdict, runs[name]["answer"]) for verdict, name in zip(verdicts, summary, strict=True)]
        answers.add_row(Text.assemble(question.question, "\n", (f"({question.answer})", "dim")), *cells)
    table = Table("", *titles, title="Figures (medians; the highest of the peaks)", title_justify="left")
    table.add_row("correct answers", *(f"{run['correct']} of {run['questions']}" for run in summary.values()))
    add_figures(table, summary.values())
    console().print("", answers, table, sep="\n")
    say("The questions show that the caches work. They are too few to measure how accurate they are.")
