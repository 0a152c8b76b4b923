"""Results of sweeps as cells of Markdown tables."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from crushkv.evaluation import Sample, by_model, read_report_samples
from crushkv.evaluation.statistics import Estimate, by_task, macro_mean, paired

Read = Callable[[Sample], float | None]
SPREAD = ("KL", "median", "95th percentile", "worst prompt")


class Block(NamedTuple):
    """A table, ready to be printed."""

    title: str
    head: Sequence[str]
    lines: Sequence[Sequence[str]]

    def __str__(self) -> str:
        rows = ["| " + " | ".join(line) + " |" for line in (self.head, *self.lines)]
        rows.insert(1, "|---|" + "---:|" * (len(self.head) - 1))
        return "\n".join([f"\n### {self.title}\n", *rows])


Blocks = Iterable[Block]


@dataclass(frozen=True)
class Results:
    """A folder of results, in which each sweep has a folder or files of its own."""

    folder: Path

    def table(self, pattern: str) -> Table:
        """The samples of all files that match, which are of one model."""
        return Table(_read(*sorted(self.folder.glob(pattern))))

    def models(self, pattern: str) -> dict[str, list[Sample]]:
        """The samples of all files that match, by model, SmolLM2 first; none where there are no files."""
        files = sorted(self.folder.glob(pattern), reverse=True)
        found = by_model(_read(*files)) if files else {}
        return {model.removesuffix(" (embedded)"): samples for model, samples in found.items()}


@cache
def _read(*files: Path) -> list[Sample]:
    return read_report_samples(files)


def kl(sample: Sample) -> float | None:
    return sample.kl


def score(sample: Sample) -> float | None:
    return sample.score


def longbench(sample: Sample) -> float | None:
    return None if sample.task.startswith("retrieval") else sample.score


def retrieval(sample: Sample) -> float | None:
    return sample.score if sample.task.startswith("retrieval") else None


class Table:
    """One model's samples by configuration, and cells of Markdown."""

    def __init__(self, samples: Sequence[Sample]) -> None:
        if len(by_model(samples)) > 1:
            raise ValueError(f"samples of several models in one table: {', '.join(by_model(samples))}")
        self.groups: dict[str, list[Sample]] = defaultdict(list)
        for sample in samples:
            self.groups[sample.name].append(sample)

    def estimate(self, name: str, read: Read = kl) -> Estimate | None:
        """The mean, each task counting alike; None where nothing was measured."""
        values = by_task(self.groups.get(name, []), read)
        return macro_mean(values) if values else None

    def mean(self, name: str, read: Read = kl, digits: int = 3, interval: bool = True) -> str:
        found = self.estimate(name, read)
        if found is None:
            return ""
        text = f"{found.mean:.{digits}f}"
        return f"{text} ({found.low:.{digits}f} to {found.high:.{digits}f})" if interval else text

    def spread_cells(self, name: str, interval: bool = False) -> list[str]:
        """KL in four cells: the mean, and over all prompts the median, the 95th percentile and the worst."""
        found = self.estimate(name)
        if found is None:
            return [""] * 4
        others = (f"{value:.3f}" for value in (found.median, found.percentile_95, found.highest))
        return [self.mean(name, interval=interval), *others]

    def difference(self, name: str, base: str, read: Read = kl, digits: int = 3) -> str:
        """Bold where the interval excludes 0."""
        found = paired(self.groups.get(name, []), self.groups.get(base, []), read)
        if found is None:
            return ""
        return _signed(found.estimate, digits)

    def lower(self, name: str, base: str, read: Read = kl) -> str:
        """On how many prompts a configuration has a lower figure than another."""
        before = {(s.task, s.id): read(s) for s in self.groups.get(base, [])}
        pairs = [(read(s), before.get((s.task, s.id))) for s in self.groups.get(name, [])]
        both = [(new, old) for new, old in pairs if new is not None and old is not None]
        return f"{sum(new < old for new, old in both)} of {len(both)}"

    def share(self, name: str) -> float:
        """Bytes held, as a share of the full cache's."""
        group = self.groups[name]
        return sum(s.bytes_fraction for s in group) / len(group)

    def bytes(self, name: str) -> str:
        return f"{self.share(name):.1%}" if name in self.groups else ""

    def only(self, read: Read) -> Table:
        """The samples for which `read` gives a figure."""
        return Table([sample for group in self.groups.values() for sample in group if read(sample) is not None])

    @property
    def tasks(self) -> list[str]:
        return list(dict.fromkeys(sample.task for group in self.groups.values() for sample in group))

    def task(self, name: str, task: str, read: Read, digits: int = 3) -> str:
        values = [v for s in self.groups.get(name, []) if s.task == task and (v := read(s)) is not None]
        return f"{sum(values) / len(values):.{digits}f}" if values else ""

    def task_scores(self, title: str, labels: Mapping[str, str]) -> Block:
        """A row for each configuration, by its name and what it is called, and a column for each task."""
        lines = [
            [label, self.bytes(name), *(self.task(name, task, score) for task in self.tasks)]
            for name, label in labels.items()
        ]
        return Block(title, ["configuration", "bytes", *self.tasks], lines)


def _signed(e: Estimate, digits: int) -> str:
    text = f"{e.mean:+.{digits}f} ({e.low:+.{digits}f} to {e.high:+.{digits}f})"
    return f"**{text}**" if e.excludes_zero else text


def mark_shares(axes: Any) -> None:
    """A logarithmic axis of the share of the full cache's bytes."""
    axes.set_xscale("log")
    axes.set_xticks([1 / 16, 1 / 8, 1 / 4], ["1/16", "1/8", "1/4"], minor=False)
    axes.set_xticks([], minor=True)
    axes.grid(alpha=0.3)
