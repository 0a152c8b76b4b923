"""Prints the tables of docs/accuracy.md on the presets, and draws its first plot, from results/presets.

python benchmarks/accuracy/preset_tables.py [--plot FILE]

A kind of results may be in several files (`fidelity.jsonl.gz`, `fidelity-qwen.jsonl.gz`). Each model has its tables.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path

import matplotlib
from tables import (
    RESULTS,
    SHORT,
    Read,
    Table,
    kl,
    longbench,
    mark_shares,
    retrieval,
    score,
    short_cells,
    show,
)

from crushkv.evaluation import by_model, read_report_samples

READAHEAD = "ahead=16,half_life=8,value_norm=true"
SIZES = {"0.25": "4 times smaller", "0.125": "8 times", "0.0625": "16 times"}
SMALLER = ("0.125", "0.0625")  # at a quarter every token fits in few bits


def halves(
    budget: str, options: str = READAHEAD, grouping: str = "score", recent_bits: int = 8, share: str = "0.5"
) -> str:
    """Kept tokens in 4 bits and a share in 2, as it is named in the sweeps; by default what `small` is."""
    formats = f"bits=4,representative_bits=2,representative_share={share},grouping={grouping},recent_bits={recent_bits}"
    return f"snapkv:budget={budget},{formats}" + (f",{options}" if options else "")


def preset(budget: str) -> str:
    """`balanced`, `small`, and `small:budget=0.0625`."""
    return halves(budget, share="0.35" if budget == "0.25" else "0.5")


def kvcrush(budget: str) -> str:
    return halves(budget, grouping="signature")


def pages(budget: str) -> str:
    """SnapKV in pages of 16, in 16 bits."""
    return "snapkv:budget=0.25,page_size=16" if budget == "0.25" else f"snapkv:budget={budget}"


def published(budget: str) -> str:
    """SnapKV of single tokens, in 16 bits."""
    return f"snapkv:budget={budget},page_size=1"


def readahead(budget: str) -> str:
    """The default: pages of 16, in 16 bits."""
    return f"readahead:budget={budget}"


ROWS = {
    "full cache": "full",
    "`safe`": "safe",
    "`balanced`": preset("0.25"),
    "`small`": preset("0.125"),
    "`small:budget=0.0625`": preset("0.0625"),
    "`small`, its second half chosen by KVCrush": kvcrush("0.125"),
    "SnapKV, half 4, half 2 bits, a quarter": halves("0.25", ""),
    "SnapKV, half 4, half 2 bits, an eighth": halves("0.125", ""),
    "16 bits (the default), a quarter": readahead("0.25"),
    "16 bits, an eighth": readahead("0.125"),
    "SnapKV in pages, 16 bits, a quarter": pages("0.25"),
    "SnapKV in pages, 16 bits, an eighth": pages("0.125"),
    "SnapKV as published, 16 bits, a quarter": published("0.25"),
}
CURVES: Mapping[str, Mapping[str, str]] = {
    "presets: readahead, 4 and 2 bits": {budget: preset(budget) for budget in SIZES},
    "the same, second half by KVCrush": {budget: kvcrush(budget) for budget in SMALLER},
    "SnapKV in pages, 4 and 2 bits": {budget: halves(budget, "") for budget in SIZES},
    "readahead in pages, 16 bits": {budget: readahead(budget) for budget in SIZES},
    "SnapKV in pages, 16 bits": {budget: pages(budget) for budget in SIZES},
    "SnapKV as published, 16 bits": {budget: published(budget) for budget in SIZES},
}
# Alike where the format is.
COLOURS = dict(zip(CURVES, ("tab:blue", "tab:orange", "tab:blue", "tab:red", "tab:red", "tab:brown"), strict=True))


def lengths(tokens: str) -> Read:
    """Score of the retrieval tasks of one length."""
    return lambda sample: sample.score if sample.task.startswith("retrieval") and sample.task.endswith(tokens) else None


def in_short(distances: Table, scores: Table) -> None:
    show(
        f"Presets, in short{distances.label}",
        ["", *SHORT, "needles, 2k", "4k"],
        [
            [
                label,
                *short_cells(distances, name, scores, name),
                *(scores.mean(name, lengths(tokens), 2, interval=False) for tokens in ("2k", "4k")),
            ]
            for label, name in ROWS.items()
        ],
    )


def goals(distances: Table, scores: Table) -> None:
    """What was aimed at: lowest score and retrieval, highest KL."""
    aims = {"0.25": ("-0.3 %", None, "-1 %"), "0.125": ("-1 %", "0.25", "-5 %"), "0.0625": ("-3 %", "1.00", "-10 %")}

    def of(table: Table, name: str, read: Read) -> float:
        found = table.estimate(name, read)
        assert found is not None, name
        return found.mean

    yardstick = of(distances, published("0.25"), kl)
    lines = []
    for budget, (least, most, found) in aims.items():
        name = preset(budget)
        worse = (of(scores, name, read) / of(scores, "full", read) - 1 for read in (longbench, retrieval))
        score_change, needles_change = (f"{100 * change:+.1f} %" for change in worse)
        lines.append(
            [
                SIZES[budget],
                score_change,
                least,
                f"{of(distances, name, kl) / yardstick:.2f}",
                most or "",
                needles_change,
                found,
            ]
        )
    show(
        f"Presets: what was aimed at{distances.label}",
        [
            "",
            "score against the full cache's",
            "goal",
            "KL by SnapKV's as published, a quarter",
            "goal",
            "needles against the full cache's",
            "goal",
        ],
        lines,
    )


def by_task_table(scores: Table) -> None:
    tasks = list(dict.fromkeys(s.task for s in scores.groups["full"]))
    show(
        f"Presets, task by task{scores.label}",
        ["", *tasks],
        [[label, *(scores.task(name, task, score) for task in tasks)] for label, name in ROWS.items()],
    )


def steps(distances: Table) -> None:
    """KL, and what each step changes."""
    found: dict[str, Callable[[str], str]] = {
        "SnapKV, sink and window in 16 bits": lambda b: halves(b, "", recent_bits=16),
        "sink and window in 8 bits": lambda b: halves(b, ""),
        "... `ahead=16`": lambda b: halves(b, "ahead=16"),
        "... `half_life=8`": lambda b: halves(b, "ahead=16,half_life=8"),
        "... `value_norm=true`: `small`": halves,
        "... a third in 2 bits instead of half: `balanced`": lambda b: preset(b) if b == "0.25" else "",
    }
    show(
        f"From SnapKV to the presets: KL{distances.label}",
        ["", *SIZES.values()],
        [[label, *(distances.spread(of(b)) for b in SIZES)] for label, of in found.items()],
    )
    pairs = [(label, of, before) for (label, of), before in zip(list(found.items())[1:], found.values(), strict=False)]
    pairs.append(("the presets, minus the first row", preset, next(iter(found.values()))))
    show(
        f"From SnapKV to the presets: what each step changes{distances.label}",
        ["minus the row before", *SIZES.values()],
        [[label, *(distances.difference(of(b), before(b)) for b in SIZES)] for label, of, before in pairs],
    )
    show(
        f"16 bits: KL{distances.label}",
        ["pages of 16", *SIZES.values()],
        [
            ["SnapKV", *(distances.spread(pages(b)) for b in SIZES)],
            ["readahead", *(distances.spread(readahead(b)) for b in SIZES)],
            ["difference", *(distances.difference(readahead(b), pages(b)) for b in SIZES)],
        ],
    )
    window = "ahead=16,value_norm=true,window=16"
    show(
        f"A window of 16 tokens, all queries alike, minus the presets: KL{distances.label}",
        ["", *(SIZES[b] for b in SMALLER)],
        [["difference", *(distances.difference(halves(b, window), halves(b)) for b in SMALLER)]],
    )


def behind_the_chat_template(table: Table) -> None:
    rows: dict[str, Callable[[str], str]] = {
        "SnapKV": lambda b: halves(b, ""),
        "the presets": lambda b: f"small:budget={b}",
        "a window of 16 tokens, all queries alike": lambda b: f"small:budget={b},window=16,half_life=0",
    }
    show(
        f"Behind the chat template: KL, and minus SnapKV's{table.label}",
        ["half 4, half 2 bits", *(SIZES[b] for b in SMALLER), *("minus SnapKV, " + SIZES[b] for b in SMALLER)],
        [
            [
                label,
                *(table.spread(of(b)) for b in SMALLER),
                *("" if label == "SnapKV" else table.difference(of(b), halves(b, "")) for b in SMALLER),
            ]
            for label, of in rows.items()
        ],
    )


def held_out(table: Table) -> None:
    presets = {"0.25": "balanced", "0.125": "small", "0.0625": "small:budget=0.0625"}
    rows: dict[str, Callable[[str], str]] = {
        "SnapKV as published, 16 bits": published,
        "SnapKV in pages, 16 bits": lambda b: f"snapkv:budget={b}",
        "readahead, 16 bits (the default)": readahead,
        "SnapKV, half 4, half 2 bits": lambda b: halves(b, "", recent_bits=16),
        "the presets": lambda b: presets[b],
    }
    pairs = [
        ("readahead minus SnapKV, 16 bits", "readahead, 16 bits (the default)", "SnapKV in pages, 16 bits"),
        ("the presets minus SnapKV in half 4, half 2 bits", "the presets", "SnapKV, half 4, half 2 bits"),
    ]
    show(
        f"Tasks that had no part in the choice: KL{table.label}",
        ["", *SIZES.values()],
        [
            *([label, *(table.spread(of(b)) for b in SIZES)] for label, of in rows.items()),
            *([label, *(table.difference(rows[new](b), rows[old](b)) for b in SIZES)] for label, new, old in pairs),
        ],
    )


def own_part(distances: Table) -> None:
    others: dict[str, Callable[[str], str]] = {
        "the next best scores": halves,
        "evenly by position": lambda b: halves(b, grouping="position"),
        "at random": lambda b: halves(b, grouping="random"),
        "none: more tokens in 4 bits": lambda b: f"snapkv:budget={b},bits=4,recent_bits=8,{READAHEAD}",
    }
    show(
        f"The second half chosen by KVCrush: KL minus KL of other choices, at equal bytes{distances.label}",
        ["minus", *(SIZES[b] for b in SMALLER)],
        [[label, *(distances.difference(kvcrush(b), other(b)) for b in SMALLER)] for label, other in others.items()],
    )


def plot(distances: Table, scores: Table, path: Path) -> None:
    """Score, retrieval and KL against the share of the full cache's bytes."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(13, 4.4), layout="constrained")
    panels = (
        ("LongBench score", scores, longbench),
        ("needles found", scores, retrieval),
        ("KL to the full cache, nats (log)", distances, kl),
    )
    for axis, (title, table, read) in zip(axes, panels, strict=True):
        for label, curve in CURVES.items():
            points = [(table.share(n), e.mean) for n in curve.values() if (e := table.estimate(n, read)) is not None]
            style = {"color": COLOURS[label], "linestyle": "--" if label.startswith("SnapKV") else "-"}
            axis.plot(*zip(*points, strict=True), marker="o", label=label, **style)
        if read is not kl:
            full = table.estimate("full", read)
            assert full is not None
            axis.axhline(full.mean, color="grey", linestyle=":", label="full cache")
            axis.set_ylim(bottom=0)
        axis.set(title=title, xlabel="share of the full cache's bytes")
        mark_shares(axis)
    axes[2].set_yscale("log")
    axes[2].set_yticks([0.01, 0.02, 0.05, 0.1, 0.2, 0.5], ["0.01", "0.02", "0.05", "0.1", "0.2", "0.5"])
    axes[2].set_yticks([], minor=True)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--plot", type=Path, help="PNG or SVG")
    parser.add_argument("--results", type=Path, default=RESULTS / "presets", help="folder of the results")
    arguments = parser.parse_args()
    kinds = ("fidelity", "scores", "chat", "held-out")
    found = [by_model(read_report_samples(sorted(arguments.results.glob(f"{kind}*.jsonl*")))) for kind in kinds]
    models = list(dict.fromkeys(model for samples in found for model in samples))
    for model in models:
        label = f": {model}" if len(models) > 1 else ""
        distances, scores, chat, others = (Table(samples.get(model, []), label) for samples in found)
        if distances.groups:
            in_short(distances, scores)
            if scores.groups:
                goals(distances, scores)
            steps(distances)
        if chat.groups:
            behind_the_chat_template(chat)
        if others.groups:
            held_out(others)
        if distances.groups:
            own_part(distances)
        if scores.groups:
            by_task_table(scores)
            if arguments.plot is not None:
                plot(distances, scores, arguments.plot)


if __name__ == "__main__":
    main()
