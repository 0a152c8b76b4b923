"""Questions answered twice: with the full cache, and with KVCrush."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import Any

from ..config import CrushConfig
from ..hf.measure import measure, warm_up
from .figures import figures
from .model_loader import LoadedModel
from .output import versions
from .progress import Progress
from .prompts import check_room, encode
from .questions import Question

FULL, CRUSHED = "full", "kvcrush"
NAMES = {FULL: "full cache", CRUSHED: "KVCrush"}


@dataclass(frozen=True)
class Answered:
    """One question, and the figures of both runs by their name."""

    question: Question
    runs: dict[str, dict[str, Any]]


class Comparison:
    """Answers questions with both caches, one after the other in turns, and sums up.

    Args:
        options: further arguments of `generate`.
    """

    def __init__(self, loaded: LoadedModel, config: CrushConfig, options: dict[str, Any]) -> None:
        self.loaded = loaded
        self.configs = {FULL: None, CRUSHED: config}
        self.config = config
        self.options = options
        self.answered: list[Answered] = []

    def answer(self, questions: list[Question]) -> None:
        """Raises `ConfigError` where a prompt is too long for the model, before anything runs."""
        prompts = [encode(self.loaded.tokenizer, question.prompt) for question in questions]
        for input_ids in prompts:
            check_room(input_ids.shape[-1], self.options["max_new_tokens"], self.loaded.model.config)
        with Progress(total=2 * len(questions)) as progress:
            progress.say("Warming up")
            for config in self.configs.values():
                warm_up(self.loaded.model, prompts[0], config)
            for number, (question, input_ids) in enumerate(zip(questions, prompts, strict=True), start=1):
                # Neither of the two always has the warmer machine.
                order = (FULL, CRUSHED) if number % 2 else (CRUSHED, FULL)
                runs = {}
                for kind in order:
                    progress.begin(f"question {number}, {NAMES[kind]}", input_ids.shape[-1])
                    runs[kind] = self._run(kind, input_ids, question, progress)
                self.answered.append(Answered(question, runs))

    def _run(self, kind: str, input_ids: Any, question: Question, progress: Progress) -> dict[str, Any]:
        start = time.perf_counter()
        run = measure(
            self.loaded.model, input_ids, self.configs[kind], on_token=lambda _: progress.token(), **self.options
        )
        text = self.loaded.tokenizer.decode(run.token_ids, skip_special_tokens=True).strip()
        progress.done(f"{time.perf_counter() - start:.1f} s")
        return {**figures(run, text), "correct": question.is_answered_by(text)}

    def summary(self) -> dict[str, dict[str, Any]]:
        """Both caches: correct answers, medians of bytes and times over the questions, the highest memory peak."""
        summed: dict[str, dict[str, Any]] = {}
        for kind in (FULL, CRUSHED):
            runs = [answered.runs[kind] for answered in self.answered]
            summed[kind] = {
                "correct": sum(run["correct"] for run in runs),
                "questions": len(runs),
                **{name: _median(runs, name) for name in MEDIANS},
                "tiers": None if kind == FULL else _mean_tiers(runs),
                "ttft_range_seconds": _range(runs, "ttft_seconds"),
                "tpot_range_seconds": _range(runs, "tpot_seconds"),
                "peak_memory_bytes": _highest(runs, "peak_memory_bytes"),
                "peak_above_start_bytes": _highest(runs, "peak_above_start_bytes"),
            }
        return summed

    def ratios(self) -> dict[str, float | None]:
        """KVCrush by the full cache."""
        summed = self.summary()
        full, crushed = summed[FULL], summed[CRUSHED]
        return {name: _ratio(crushed[name], full[name]) for name in RATIOS}

    def to_dict(self) -> dict[str, Any]:
        return {
            "questions": [
                {"question": a.question.question, "expected": a.question.answer, **a.runs} for a in self.answered
            ],
            "summary": {**self.summary(), "ratios": self.ratios()},
            "options": self.options,
            "config": self.config.to_dict(),
            "model": self.loaded.describe(),
            "versions": versions(),
        }

    def show(self) -> None:
        from .comparison_tables import show

        show(self)


MEDIANS = (
    "kv_bytes",
    "full_kv_bytes",
    "bytes_fraction",
    "state_bytes",
    "tokens_seen",
    "tokens_held",
    "ttft_seconds",
    "tpot_seconds",
)
RATIOS = ("bytes_fraction", "ttft_seconds", "tpot_seconds", "peak_memory_bytes", "peak_above_start_bytes")


def _median(runs: list[dict[str, Any]], name: str) -> float | None:
    values = [run[name] for run in runs if run[name] is not None]
    return statistics.median(values) if values else None


def _highest(runs: list[dict[str, Any]], name: str) -> int | None:
    return max((run[name] for run in runs if run[name] is not None), default=None)


def _range(runs: list[dict[str, Any]], name: str) -> list[float] | None:
    values = [run[name] for run in runs if run[name] is not None]
    return [min(values), max(values)] if values else None


def _mean_tiers(runs: list[dict[str, Any]]) -> dict[str, float]:
    return {tier: statistics.fmean(run["tiers"][tier] for run in runs) for tier in runs[0]["tiers"]}


def _ratio(part: float | None, whole: float | None) -> float | None:
    return part / whole if part is not None and whole else None
