"""Prints the tables of docs/accuracy.md on the presets, and draws its first plot, from results/presets.

python benchmarks/accuracy/preset_tables.py [--plot FILE]

Each model has files of its own (`fidelity.jsonl.gz` and `scores.jsonl.gz`, `fidelity-qwen.jsonl.gz` ...).
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import matplotlib
from tables import RESULTS, SPREAD, Table, longbench, mark_shares, retrieval, show

from crushkv.evaluation import Sample, by_model, read_report_samples

Tables = Mapping[str, Table]  # by the model's name

PRESETS = {"0.25": "balanced", "0.125": "small", "0.0625": "tiny"}
SIZES = {"0.25": "a quarter", "0.125": "an eighth", "0.0625": "a sixteenth"}
GOALS = {"0.25": (0.01, 0.06), "0.125": (0.03, 0.3), "0.0625": (0.1, 1.0)}
"""Highest KL that was aimed at: the mean, and the worst prompt."""


def equal(budget: str) -> str:
    """Half of what is kept in 4 bits and half in 2, all channels of a key alike."""
    formats = "bits=4,representative_bits=2,representative_share=0.5,grouping=score,recent_bits=8,key_widths=equal"
    return f"readahead:budget={budget},{formats}"


DEFAULT = "readahead:budget=0.25"
PUBLISHED = "snapkv:budget=0.25,page_size=1"
LABELS = {
    "full": "full cache",
    **{name: f"`{name}`" for name in ("safe", *PRESETS.values())},
    DEFAULT: "readahead in pages, 16 bits, a quarter",
    PUBLISHED: "SnapKV as published, 16 bits, a quarter",
    **{equal(b): f"equal widths, 4 and 2 bits, {size}" for b, size in SIZES.items()},
}
SHORT = ("safe", *PRESETS.values(), DEFAULT, PUBLISHED)
CURVES = {
    "presets": ("safe", *PRESETS.values()),
    "equal widths, 4 and 2 bits": tuple(map(equal, SIZES)),
    "readahead in pages, 16 bits (the default)": (DEFAULT,),
    "SnapKV as published, 16 bits": (PUBLISHED,),
}


def as_one_task(samples: Sequence[Sample]) -> list[Sample]:
    """Few prompts a task: drawn within their task, as elsewhere, they would give intervals that are far too narrow."""
    return [replace(sample, task="all", id=f"{sample.task} {sample.id}") for sample in samples]


def in_short(tables: Tables) -> None:
    """The README's."""
    prompts = " and ".join(str(len(table.groups["full"])) for table in tables.values())
    head = ["preset", "bytes held", *(f"KL, {model.removesuffix('-Instruct')}: mean (worst)" for model in tables)]
    first = next(iter(tables.values()))
    lines = []
    for name in SHORT:
        spreads = [table.spread_cells(name) for table in tables.values()]
        lines.append([LABELS[name], first.bytes(name), *(f"{mean} ({worst})" for mean, _, _, worst in spreads)])
    show(f"Presets, in short: {prompts} prompts", head, lines)


def goals(tables: Tables) -> None:
    lines = []
    for budget, aims in GOALS.items():
        line = [f"`{PRESETS[budget]}`, {SIZES[budget]}"]
        for which, aim in zip(("mean", "highest"), aims, strict=True):
            line.append(f"{aim:g}")
            for table in tables.values():
                found = table.estimate(PRESETS[budget])
                assert found is not None
                value = getattr(found, which)
                line.append(f"{value:.3f}, {'met' if value <= aim else '**missed**'}")
        lines.append(line)
    head = ["", "goal: mean, at most", *tables, "goal: worst prompt, at most", *tables]
    show("Presets: what was aimed at", head, lines)


def of_model(model: str, table: Table) -> None:
    show(
        f"Presets: {model}",
        ["", "bytes", *SPREAD, "prompts"],
        [
            [
                label,
                table.bytes(name),
                table.mean(name),
                *table.spread_cells(name)[1:],
                str(len(table.groups[name])),
            ]
            for name, label in LABELS.items()
        ],
    )


def widths(tables: Tables) -> None:
    show(
        "Presets minus equal widths in 4 and 2 bits: KL, prompt by prompt",
        ["", *tables],
        [[size, *(t.difference(PRESETS[b], equal(b)) for t in tables.values())] for b, size in SIZES.items()],
    )


def answers(tables: Tables) -> None:
    """The tasks' own metrics of generated answers: LongBench's, each task counting alike, and hidden numbers."""
    head = [""]
    for model, table in tables.items():
        prompts = sum(longbench(sample) is not None for sample in table.groups["full"])
        head += [f"{model}: LongBench, {prompts} prompts", "minus the full cache", "hidden numbers found"]
    lines = []
    for name, label in LABELS.items():
        line = [label]
        for table in tables.values():
            found = [value for sample in table.groups.get(name, []) if (value := retrieval(sample)) is not None]
            line += [
                table.mean(name, longbench),
                "" if name == "full" else table.difference(name, "full", longbench),
                f"{sum(found):g} of {len(found)}" if found else "",
            ]
        if any(line[1:]):
            lines.append(line)
    show("Presets: answers", head, lines)


def plot(tables: Tables, path: Path) -> None:
    """KL against the share of the full cache's bytes."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(tables), figsize=(11, 4.4), sharey=True, layout="constrained", squeeze=False)
    for axis, (model, table) in zip(axes[0], tables.items(), strict=True):
        for label, names in CURVES.items():
            points = [(table.share(n), e.mean) for n in names if (e := table.estimate(n)) is not None]
            axis.plot(*zip(*points, strict=True), marker="o", label=label)
        mark_shares(axis)
        axis.set(title=model, xlabel="share of the full cache's bytes", yscale="log")
    axes[0, 0].set_ylabel("KL to the full cache, nats")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=120)


def _read(folder: Path, kind: str) -> dict[str, list[Sample]]:
    """Samples by model, SmolLM2 first."""
    files = sorted(folder.glob(f"{kind}*.jsonl*"), reverse=True)
    if not files:
        return {}
    return {model.removesuffix(" (embedded)"): s for model, s in by_model(read_report_samples(files)).items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--plot", type=Path, help="PNG or SVG")
    parser.add_argument("--results", type=Path, default=RESULTS / "presets", help="folder of the results")
    arguments = parser.parse_args()
    distances, scores = (_read(arguments.results, kind) for kind in ("fidelity", "scores"))
    tables = {model: Table(as_one_task(samples)) for model, samples in distances.items()}
    in_short(tables)
    goals(tables)
    for model, table in tables.items():
        of_model(model, table)
    widths(tables)
    if scores:
        answers({model: Table(samples) for model, samples in scores.items()})
    if arguments.plot is not None:
        plot(tables, arguments.plot)


if __name__ == "__main__":
    main()
