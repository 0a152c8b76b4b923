"""Prints the tables of docs/accuracy.md from the results beside this file.

python benchmarks/accuracy/tables.py
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from crushkv.evaluation import Sample, by_model, read_report_samples
from crushkv.evaluation.statistics import Estimate, by_task, macro_mean, paired

RESULTS = Path(__file__).parent / "results"
BUDGETS = ("0.5", "0.25", "0.125")
Read = Callable[[Sample], float | None]


def kl(sample: Sample) -> float | None:
    return sample.kl


def score(sample: Sample) -> float | None:
    return sample.score


def longbench(sample: Sample) -> float | None:
    return None if sample.task.startswith("retrieval") else sample.score


def retrieval(sample: Sample) -> float | None:
    return sample.score if sample.task.startswith("retrieval") else None


class Table:
    """One model's samples by configuration, and cells of Markdown.

    label: what titles of its tables end with, where there are tables of several models.
    """

    def __init__(self, samples: Sequence[Sample], label: str = "") -> None:
        if len(by_model(samples)) > 1:
            raise ValueError(f"samples of several models in one table: {', '.join(by_model(samples))}")
        self.label = label
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

    def spread(self, name: str) -> str:
        """KL: the mean with its interval, and over all prompts the median, the 95th percentile and the worst."""
        mean, *others = self.spread_cells(name, interval=True)
        return f"{mean}; {', '.join(others)}" if mean else ""

    def spread_cells(self, name: str, interval: bool = False) -> list[str]:
        """The same as four cells."""
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

    def share(self, name: str) -> float:
        """Bytes held, as a share of the full cache's."""
        group = self.groups[name]
        return sum(s.bytes_fraction for s in group) / len(group)

    def bytes(self, name: str) -> str:
        return f"{self.share(name):.1%}" if name in self.groups else ""

    def task(self, name: str, task: str, read: Read, digits: int = 3) -> str:
        values = [v for s in self.groups.get(name, []) if s.task == task and (v := read(s)) is not None]
        return f"{sum(values) / len(values):.{digits}f}" if values else ""


def _signed(e: Estimate, digits: int) -> str:
    text = f"{e.mean:+.{digits}f} ({e.low:+.{digits}f} to {e.high:+.{digits}f})"
    return f"**{text}**" if e.excludes_zero else text


def show(title: str, head: Sequence[str], lines: Sequence[Sequence[str]]) -> None:
    print(f"\n### {title}\n")
    print("| " + " | ".join(head) + " |")
    print("|---|" + "---:|" * (len(head) - 1))
    for line in lines:
        print("| " + " | ".join(line) + " |")


SPREAD = ("KL", "median", "95th percentile", "worst prompt")
SHORT = ("bytes", *SPREAD, "same token", "LongBench score", "minus the full cache")


def short_cells(distances: Table, followed: str, scores: Table, answered: str) -> list[str]:
    """Cells under `SHORT`: of a configuration's name in the sweep of fidelity and in that of scores."""
    return [
        scores.bytes(answered),
        *distances.spread_cells(followed),
        distances.mean(followed, lambda s: s.agreement, interval=False),
        scores.mean(answered, longbench, interval=False),
        "" if answered == "full" else scores.difference(answered, "full", longbench),
    ]


def mark_shares(axes: Any) -> None:
    """A logarithmic axis of the share of the full cache's bytes."""
    axes.set_xscale("log")
    axes.set_xticks([1 / 16, 1 / 8, 1 / 4], ["1/16", "1/8", "1/4"], minor=False)
    axes.set_xticks([], minor=True)
    axes.grid(alpha=0.3)


def name(policy: str, budget: str, page: int, share: str, more: str = "") -> str:
    return f"{policy}:budget={budget},page_size={page},representative_share={share}" + (f",{more}" if more else "")


def short(table: Table) -> None:
    """Rows in short."""
    needles = ("retrieval_single_2k", "retrieval_multikey_2k")
    labels = {
        "full": "full cache",
        name("snapkv", "0.25", 16, "0"): "SnapKV, pages of 16",
        name("snapkv", "0.25", 16, "0.1"): "the same, 10 % of it KVCrush's representatives",
        name("snapkv", "0.25", 1, "0"): "SnapKV, single tokens",
        name("snapkv", "0.25", 1, "0.1"): "the same, 10 % representatives: KVCrush as published",
        name("h2o", "0.25", 1, "0"): "H2O, single tokens",
        name("h2o", "0.25", 1, "0.1"): "the same, 10 % representatives",
        name("pyramidkv", "0.25", 1, "0"): "PyramidKV, single tokens",
        name("streaming_llm", "0.25", 1, "0"): "StreamingLLM (first and last tokens)",
    }
    show(
        "A quarter of the cache, in short",
        ["", *SPREAD, "same token", "LongBench score", "one needle", "one of four needles"],
        [
            [
                label,
                *table.spread_cells(n),
                table.mean(n, lambda s: s.agreement, interval=False),
                table.mean(n, longbench, interval=False),
                *(table.task(n, task, score, 2) for task in needles),
            ]
            for n, label in labels.items()
        ],
    )


def fidelity(table: Table) -> None:
    policies = ("snapkv", "expected_attention", "streaming_llm", "tova", "h2o", "pyramidkv", "random")
    budgets = [f"{float(b):.1%} of the tokens" for b in BUDGETS]
    show(
        "KL of importance alone, tokens",
        ["policy", *budgets],
        [[p, *(table.mean(name(p, b, 1, "0")) for b in BUDGETS)] for p in policies],
    )
    show(
        "KL of pages, importance alone",
        ["policy, page", *budgets],
        [
            [f"{p}, {page}", *(table.mean(name(p, b, page, "0")) for b in BUDGETS)]
            for p, pages in (("snapkv", (1, 8, 16, 32)), ("h2o", (1, 16)))
            for page in pages
        ],
    )
    show(
        "KL of larger pages minus KL of pages of 16 (SnapKV)",
        ["page", *budgets],
        [["32", *(table.difference(name("snapkv", b, 32, "0"), name("snapkv", b, 16, "0")) for b in BUDGETS)]],
    )
    show(
        "KL of pages minus KL of tokens",
        ["policy, page", *budgets],
        [
            [f"{p}, {page}", *(table.difference(name(p, b, page, "0"), name(p, b, 1, "0")) for b in BUDGETS)]
            for p, pages in (("snapkv", (8, 16, 32)), ("h2o", (16,)))
            for page in pages
        ],
    )
    show(
        "KL with representatives minus KL of importance alone",
        ["policy, page, share", *budgets],
        [
            [f"{p}, {page}, {s}", *(table.difference(name(p, b, page, s), name(p, b, page, "0")) for b in BUDGETS)]
            for p, page, shares in (
                ("snapkv", 1, ("0.05", "0.1", "0.25")),
                ("h2o", 1, ("0.05", "0.1", "0.25")),
                ("pyramidkv", 1, ("0.05", "0.1", "0.25")),
                ("snapkv", 16, ("0.1", "0.25")),
            )
            for s in shares
        ],
    )
    show(
        "KL of signature groups minus KL of the control, a quarter of the part given to representatives",
        ["policy, page, budget", "minus random groups", "minus groups by position"],
        [
            [
                f"{p}, {page}, {b}",
                *(
                    table.difference(name(p, b, page, "0.25"), name(p, b, page, "0.25", f"grouping={g}"))
                    for g in ("random", "position")
                ),
            ]
            for p, page, b in (
                ("snapkv", 1, "0.25"),
                ("snapkv", 1, "0.125"),
                ("snapkv", 16, "0.25"),
                ("snapkv", 16, "0.125"),
                ("h2o", 1, "0.25"),
            )
        ],
    )
    # As the recorded results name them: `anchors` is `anchor` now, and the last three left the library.
    variants = (
        "",
        "anchors=inverse_mean",
        "anchors=alternating",
        "anchors=random",
        "anchors=zeros",
        "anchors=ones",
        "signature=collapsed",
        "threshold=median",
        "representative=best",
    )
    show(
        "SnapKV at a quarter, a quarter of that representatives: KL minus KL of importance alone",
        ["variant", "tokens", "pages of 16"],
        [
            [
                v or "mean anchor, a bit a query head, middle of the bucket",
                *(
                    table.difference(name("snapkv", "0.25", page, "0.25", v), name("snapkv", "0.25", page, "0"))
                    for page in (1, 16)
                ),
            ]
            for v in variants
        ],
    )
    tasks = list(dict.fromkeys(s.task for group in table.groups.values() for s in group))
    main = [
        name("snapkv", "0.25", 16, "0"),
        name("snapkv", "0.25", 16, "0.1"),
        name("snapkv", "0.25", 1, "0"),
        name("snapkv", "0.25", 1, "0.1"),
        name("h2o", "0.25", 1, "0"),
        name("expected_attention", "0.25", 1, "0"),
        name("streaming_llm", "0.25", 1, "0"),
        name("random", "0.25", 1, "0"),
    ]
    show(
        "KL by task, at a quarter",
        ["configuration", *tasks],
        [[n, *(table.task(n, t, kl) for t in tasks)] for n in main],
    )


def scores(table: Table) -> None:
    names = [n for n, group in table.groups.items() if any(s.score is not None for s in group)]
    tasks = list(dict.fromkeys(s.task for s in table.groups[names[0]]))
    show(
        "Task scores at a quarter",
        ["configuration", "bytes", *tasks],
        [[n, table.bytes(n), *(table.task(n, t, score) for t in tasks)] for n in names],
    )
    show(
        "Mean scores at a quarter",
        ["configuration", "LongBench", "minus the full cache", "retrieval", "minus the full cache"],
        [
            [
                n,
                *(
                    cell
                    for read in (longbench, retrieval)
                    for cell in (
                        table.mean(n, read, interval=False),
                        "" if n == "full" else table.difference(n, "full", read),
                    )
                ),
            ]
            for n in names
        ],
    )
    pairs = {n: n.replace("representative_share=0.1", "representative_share=0") for n in names if n.endswith("=0.1")}
    pages = (name("snapkv", "0.25", 16, "0"), name("snapkv", "0.25", 1, "0"))
    show(
        "Differences of mean scores",
        ["what", "LongBench", "retrieval"],
        [
            [label, *(table.difference(n, base, read) for read in (longbench, retrieval))]
            for label, n, base in (
                ("SnapKV, pages of 16 minus tokens", *pages),
                *(
                    (f"{n.split(',representative')[0]}, 10 % representatives minus none", n, b)
                    for n, b in pairs.items()
                ),
            )
        ],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", nargs="*", type=Path, default=sorted(RESULTS.glob("*.jsonl.gz")))
    table = Table(read_report_samples(parser.parse_args().results))
    short(table)
    if any(s.kl is not None for group in table.groups.values() for s in group):
        fidelity(Table([s for group in table.groups.values() for s in group if s.kl is not None]))
    if any(s.score is not None for group in table.groups.values() for s in group):
        scores(Table([s for group in table.groups.values() for s in group if s.score is not None]))


if __name__ == "__main__":
    main()
