"""Tables and a plot on the presets, from results/presets.

Each model has files of its own (`fidelity.jsonl.gz` and `scores.jsonl.gz`, `fidelity-qwen.jsonl.gz` ...).
"""

from __future__ import annotations

from dataclasses import replace

from cells import SPREAD, Block, Blocks, Results, Table, longbench, mark_shares, retrieval
from matplotlib.figure import Figure

DISTANCES, SCORES = "presets/fidelity*.jsonl*", "presets/scores*.jsonl*"
PRESETS = {"0.25": "balanced", "0.125": "small", "0.0625": "tiny"}
SIZES = {"0.25": "a quarter", "0.125": "an eighth", "0.0625": "a sixteenth"}
GOALS = {"0.25": (0.01, 0.06), "0.125": (0.03, 0.3), "0.0625": (0.1, 1.0)}
"""Highest KL that was aimed at: the mean, and the worst prompt."""


def equal(budget: str) -> str:
    """Half of what is kept in 4 bits and half in 2, all channels of a key alike."""
    formats = "bits=4,representative_bits=2,representative_share=0.5,grouping=score,recent_bits=8,key_widths=equal"
    return f"readahead:budget={budget},{formats}"


def equal_heads(budget: str) -> str:
    """The preset with the same number of tokens for all heads of a layer."""
    name = PRESETS[budget]
    return name if name == "balanced" else f"{name}:heads=equal"


DEFAULT = "readahead:budget=0.25"
BY_NEED = f"{DEFAULT},heads=profile"
PUBLISHED = "snapkv:budget=0.25,page_size=1"
LABELS = {
    "full": "full cache",
    **{name: f"`{name}`" for name in ("safe", *PRESETS.values())},
    **{equal_heads(b): f"`{PRESETS[b]}` with equal heads" for b in ("0.125", "0.0625")},
    DEFAULT: "readahead in pages, 16 bits, a quarter",
    BY_NEED: "the same, heads by need",
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


def distances(results: Results) -> dict[str, Table]:
    """A table of each model. All prompts count as one task.

    There are few prompts a task. Drawn within their task, as elsewhere, they would give far too narrow intervals.
    """
    return {
        model: Table([replace(sample, task="all", id=f"{sample.task} {sample.id}") for sample in samples])
        for model, samples in results.models(DISTANCES).items()
    }


def in_short(results: Results) -> Blocks:
    """The README's."""
    tables = distances(results)
    prompts = " and ".join(str(len(table.groups["full"])) for table in tables.values())
    head = ["preset", "bytes held", *(f"KL, {model.removesuffix('-Instruct')}: mean (worst)" for model in tables)]
    first = next(iter(tables.values()))
    lines = []
    for name in SHORT:
        spreads = [table.spread_cells(name) for table in tables.values()]
        lines.append([LABELS[name], first.bytes(name), *(f"{mean} ({worst})" for mean, _, _, worst in spreads)])
    yield Block(f"Presets, in short: {prompts} prompts", head, lines)


def goals(results: Results) -> Blocks:
    tables = distances(results)
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
    yield Block("Presets: what was aimed at", head, lines)


def by_model(results: Results) -> Blocks:
    for model, table in distances(results).items():
        lines = [
            [label, table.bytes(name), *table.spread_cells(name, interval=True), str(len(table.groups[name]))]
            for name, label in LABELS.items()
        ]
        yield Block(f"Presets: {model}", ["", "bytes", *SPREAD, "prompts"], lines)


def widths(results: Results) -> Blocks:
    tables = distances(results)
    yield Block(
        "Presets minus equal widths in 4 and 2 bits: KL, prompt by prompt",
        ["", *tables],
        [[size, *(t.difference(equal_heads(b), equal(b)) for t in tables.values())] for b, size in SIZES.items()],
    )


def heads(results: Results) -> Blocks:
    """Budgets by what heads need against equal ones, at the same bytes."""
    for model, table in distances(results).items():
        lines = []
        for name, before in ((BY_NEED, DEFAULT), ("small", equal_heads("0.125")), ("tiny", equal_heads("0.0625"))):
            spreads = [table.spread_cells(which) for which in (before, name)]
            changed = [f"{old}, {new}" for old, new in zip(*spreads, strict=True)]
            label = LABELS[DEFAULT if name == BY_NEED else name]
            lines.append([label, *changed, table.difference(name, before), table.lower(name, before)])
        head = ["equal heads, heads by need", *SPREAD, "difference of KL", "prompts with a lower KL"]
        yield Block(f"Heads: {model}", head, lines)


def scores(results: Results) -> Blocks:
    """The tasks' own metrics of generated answers: LongBench's, each task counting alike, and hidden numbers."""
    tables = {model: Table(samples) for model, samples in results.models(SCORES).items()}
    if not tables:
        return
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
    yield Block("Presets: answers", head, lines)


def plot(results: Results) -> Figure:
    """KL against the share of the full cache's bytes."""
    tables = distances(results)
    figure = Figure(figsize=(11, 4.4), layout="constrained", dpi=120)
    axes = figure.subplots(1, len(tables), sharey=True, squeeze=False)
    for axis, (model, table) in zip(axes[0], tables.items(), strict=True):
        for label, names in CURVES.items():
            points = [(table.share(n), e.mean) for n in names if (e := table.estimate(n)) is not None]
            axis.plot(*zip(*points, strict=True), marker="o", label=label)
        mark_shares(axis)
        axis.set(title=model, xlabel="share of the full cache's bytes", yscale="log")
    axes[0, 0].set_ylabel("KL to the full cache, nats")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    return figure
