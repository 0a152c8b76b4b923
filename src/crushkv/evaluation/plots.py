"""Plots of a report, as matplotlib figures: a curve for each method, a panel for each model."""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullLocator

from ..presets import PRESETS
from .data import DataError
from .statistics import Estimate
from .tables import Row

Read = Callable[[Row], Estimate | None]

# Names come from users: a dollar sign in them is no formula. Salted, the same figure gives the same SVG.
_STYLE = {"text.parse_math": False, "svg.hashsalt": "crushkv", "font.size": 10, "axes.grid": True, "grid.alpha": 0.25}
_INK = {False: "#1b1f24", True: "#eceef1"}
_GREY = {False: "#b4b9c0", True: "#59616b"}
# More colours than these are not told apart. The other methods are grey.
_COLOURS = {
    False: ("#0b57b0", "#c2410c", "#0d7a4f", "#7a3fb5", "#a3660b", "#b0206b", "#0a7d8c", "#5b636d"),
    True: ("#8ebdff", "#ff9a6b", "#6ee0b0", "#c9a6ff", "#ffc861", "#ff8ac4", "#6fd8e6", "#b4bcc6"),
}


@dataclass(frozen=True)
class _Measure:
    title: str
    label: str
    log: bool  # a logarithmic axis, on which lower is better; else higher is better
    read: Read


_MEASURES = {
    "kl-by-bytes": _Measure("Fidelity against bytes", "KL to the full cache [nats]", True, lambda row: row.kl),
    "score-by-bytes": _Measure("Task score against bytes", "task score, mean over tasks", False, lambda row: row.score),
}
TITLES = {name: measure.title for name, measure in _MEASURES.items()}


def figures(rows: Sequence[Row], dark: bool = False) -> dict[str, Figure]:
    """A plot for each measure that the rows have, by a name fit for a file: `kl-by-bytes` and `score-by-bytes`."""
    with mpl.rc_context(_style(dark)):
        found = {name: _figure(rows, measure, dark) for name, measure in _MEASURES.items()}
    return {name: figure for name, figure in found.items() if figure is not None}


def as_svg(figure: Figure, dark: bool = False) -> str:
    """The figure with a transparent background."""
    return _saved(figure, "svg", dark).decode("utf-8")


def save(plots: dict[str, Figure], folder: Path) -> None:
    """Writes each plot as PNG and as SVG.

    Raises:
        DataError: a file cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, figure in plots.items():
            for kind in ("png", "svg"):
                (folder / f"{name}.{kind}").write_bytes(_saved(figure, kind))
    except OSError as error:
        raise DataError(f"{folder}: {error}") from None


def _style(dark: bool) -> Any:  # matplotlib's types know its keys, and no plain dictionary
    ink = _INK[dark]
    names = ("text.color", "axes.edgecolor", "axes.labelcolor", "axes.titlecolor", "xtick.color", "ytick.color")
    return _STYLE | dict.fromkeys(names, ink) | {"axes.facecolor": "none", "grid.color": ink}


def _saved(figure: Figure, kind: str, dark: bool = False) -> bytes:
    buffer = io.BytesIO()
    metadata = {"Date": None} if kind == "svg" else None
    with mpl.rc_context(_style(dark)):
        figure.savefig(buffer, format=kind, dpi=120, metadata=metadata, transparent=kind == "svg")
    return buffer.getvalue()


def _figure(rows: Sequence[Row], measure: _Measure, dark: bool) -> Figure | None:
    measured = [row for row in rows if measure.read(row) is not None]
    points = [row for row in measured if row.config is not None]
    if not points:
        return None
    models = list(dict.fromkeys(row.model for row in points))
    methods = _by_method([row for row in points if row.name not in PRESETS])
    coloured = _best(methods, measure)
    colours = dict(zip(coloured, _COLOURS[dark], strict=False))
    figure = Figure(figsize=(11.5, 5 + 0.11 * len(coloured)), layout="constrained")
    axes = figure.subplots(1, len(models), squeeze=False, sharex=True, sharey=True)[0]
    for axis, model in zip(axes, models, strict=True):
        own = [row for row in measured if row.model == model]
        curves = _by_method([row for row in own if row.config is not None and row.name not in PRESETS])
        for method, curve in curves.items():
            if method in colours:
                _curve(axis, curve, measure.read, colours[method], _short(method), coloured.index(method))
            else:
                axis.plot(
                    *_line(curve, measure.read), color=_GREY[dark], linewidth=0.8, marker="o", markersize=2, zorder=1
                )
        _presets(axis, [row for row in own if row.name in PRESETS], measure.read, _INK[dark])
        full = next((measure.read(row) for row in own if row.config is None), None)
        if full is not None and not measure.log:
            axis.axhline(full.mean, color=_INK[dark], linestyle=":", linewidth=1, label="full cache")
        axis.set_title(_short(model, 60) if len(models) > 1 else "")
        axis.set_xlabel("bytes held, as a share of the full cache")
        _share_axis(axis, [row.bytes_fraction for row in points])
        if measure.log:
            axis.set_yscale("log")
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 3)))
            axis.yaxis.set_minor_locator(NullLocator())
            axis.yaxis.set_major_formatter(_plain)
    axes[0].set_ylabel(measure.label)
    _legend(figure, axes, len(methods) - len(coloured), _GREY[dark])
    return figure


def _by_method(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The points of each curve, by bytes."""
    methods: dict[str, list[Row]] = defaultdict(list)
    for row in sorted(rows, key=lambda row: row.bytes_fraction):
        methods[row.method].append(row)
    return dict(methods)


def _best(methods: dict[str, list[Row]], measure: _Measure) -> list[str]:
    """The methods that get a colour: curves before single points, then the best of each policy, then the next best.

    The best is the one that other methods beat least often with no more bytes.
    """
    points = [(row, measure.read(row)) for rows in methods.values() for row in rows]

    def beaten(row: Row) -> int:
        own = measure.read(row)
        assert own is not None
        return sum(
            other.model == row.model
            and other.bytes_fraction <= 1.02 * row.bytes_fraction
            and (found.mean < own.mean if measure.log else found.mean > own.mean)
            for other, found in points
            if found is not None
        )

    def policy(method: str) -> str:
        return methods[method][0].config["policy"]  # type: ignore[index]

    def single(method: str) -> bool:
        rows = methods[method]
        return len(rows) < 2 * len({row.model for row in rows})

    merit = {method: sum(map(beaten, rows)) / len(rows) for method, rows in methods.items()}
    ordered = sorted(methods, key=lambda method: (single(method), merit[method]))
    place = {method: [policy(m) for m in ordered[:i]].count(policy(method)) for i, method in enumerate(ordered)}
    return sorted(ordered, key=lambda method: (single(method), place[method], merit[method]))[: len(_COLOURS[False])]


def _line(points: Sequence[Row], read: Read) -> tuple[list[float], list[float]]:
    return [row.bytes_fraction for row in points], [found.mean for row in points if (found := read(row)) is not None]


def _spread(points: Sequence[Row], read: Read) -> list[list[float]]:
    """How far the intervals reach below and above the means."""
    found = [estimate for row in points if (estimate := read(row)) is not None]
    return [[e.mean - e.low for e in found], [e.high - e.mean for e in found]]


def _curve(axis: Axes, points: Sequence[Row], read: Read, colour: str, label: str, index: int) -> None:
    x, means = _line(points, read)
    x = [share * 1.006**index for share in x]  # curves of equal bytes would hide each other's intervals
    style = {"marker": "o", "markersize": 4, "linewidth": 1.4, "capsize": 2}
    axis.errorbar(x, means, yerr=_spread(points, read), color=colour, label=label, **style)  # type: ignore[arg-type]


def _presets(axis: Axes, points: list[Row], read: Read, ink: str) -> None:
    """The presets as one curve, each with its name."""
    if not points:
        return
    points = sorted(points, key=lambda row: row.bytes_fraction)
    x, means = _line(points, read)
    style = {"marker": "*", "markersize": 10, "linewidth": 2, "capsize": 2}
    axis.errorbar(x, means, yerr=_spread(points, read), color=ink, label="presets", **style)  # type: ignore[arg-type]
    for row, place, mean in zip(points, x, means, strict=True):
        axis.annotate(row.name, (place, mean), (6, 6), textcoords="offset points", weight="bold", color=ink)


def _share_axis(axis: Axes, shares: Sequence[float]) -> None:
    axis.set_xscale("log", base=2)
    axis.set_xlim(min(shares) / 1.2, max(shares) * 1.35)
    axis.xaxis.set_major_formatter(lambda value, _: f"1/{round(1 / value)}" if value < 1 else f"{value:g}")
    axis.xaxis.set_minor_locator(NullLocator())


def _legend(figure: Figure, axes: Sequence[Axes], others: int, grey: str) -> None:
    handles = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    labels = sorted(handles, key=lambda label: label != "presets")
    entries = [handles[label] for label in labels]
    if others:
        entries.append(Line2D([], [], color=grey, linewidth=0.8, marker="o", markersize=2))
        labels.append(f"{others} others, which the table names")
    columns = 1 if max(map(len, labels)) > 70 else 2 if max(map(len, labels)) > 40 else 3
    figure.legend(entries, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=9)


def _short(name: str, limit: int = 90) -> str:
    """Longer names would leave no room for the plot."""
    name = " ".join(name.split())
    return name if len(name) <= limit else name[: limit - 3] + "..."


def _plain(value: float, _: object) -> str:
    return f"{value:.3g}"
