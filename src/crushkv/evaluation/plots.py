"""Plots of a report, as matplotlib figures."""

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
from matplotlib.ticker import LogLocator, NullLocator

from .data import DataError
from .statistics import Comparison, Estimate
from .tables import Row

# Names come from users: a dollar sign in them is no formula. Salted, the same figure gives the same SVG.
_STYLE = {"text.parse_math": False, "svg.hashsalt": "crushkv", "font.size": 9, "axes.grid": True, "grid.alpha": 0.3}
_COLUMNS = 3
# These stand in every panel, in grey.
_REFERENCES = ("random", "streaming_llm")


def figures(rows: Sequence[Row]) -> dict[str, Figure]:
    """Every plot for which there are figures, by a name fit for a file. Several models have their own plots."""
    models = list(dict.fromkeys(row.model for row in rows))
    if len(models) == 1:
        return _figures(rows)
    return {
        f"{name}-{number}": _named(figure, model)
        for number, model in enumerate(models, start=1)
        for name, figure in _figures([row for row in rows if row.model == model]).items()
    }


def _named(figure: Figure, model: str) -> Figure:
    with mpl.rc_context(_STYLE):  # type: ignore[arg-type]
        figure.suptitle(_short(model))
    return figure


def _figures(rows: Sequence[Row]) -> dict[str, Figure]:
    with mpl.rc_context(_STYLE):  # type: ignore[arg-type]
        found = {
            "kl-by-bytes": _curves(rows, lambda row: row.kl, "KL to the full cache [nats]", log=True),
            "score-by-bytes": _curves(rows, lambda row: row.score, "task score, mean over tasks", log=False),
            "score-to-full": _differences(rows, lambda row: row.score_to_full, "score minus the full cache's"),
            "kl-to-importance-only": _differences(
                rows, lambda row: row.kl_to_base, "KL minus that of importance alone at the same budget"
            ),
            "score-to-importance-only": _differences(
                rows, lambda row: row.score_to_base, "score minus that of importance alone at the same budget"
            ),
        }
    return {name: figure for name, figure in found.items() if figure is not None}


def as_svg(figure: Figure) -> str:
    return _saved(figure, "svg").decode("utf-8")


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


def _saved(figure: Figure, kind: str) -> bytes:
    buffer = io.BytesIO()
    metadata = {"Date": None} if kind == "svg" else None
    with mpl.rc_context(_STYLE):  # type: ignore[arg-type]
        figure.savefig(buffer, format=kind, dpi=120, metadata=metadata)
    return buffer.getvalue()


def _curves(rows: Sequence[Row], read: Callable[[Row], Estimate | None], label: str, log: bool) -> Figure | None:
    """The figure against the bytes held, intervals as bars: a panel for importance alone, then one a policy."""
    panels = _panels([row for row in rows if read(row) is not None])
    if not panels:
        return None
    full = next((read(row) for row in rows if row.config is None), None)
    references = {method: points for method, points in panels[0].curves.items() if method.startswith(_REFERENCES)}
    shares = [row.bytes_fraction for panel in panels for points in panel.curves.values() for row in points]
    lowest, highest = min(shares), max(shares)
    columns = min(_COLUMNS, len(panels))
    lines = -(-len(panels) // columns)
    longest = max(len(panel.curves) for panel in panels)
    figure = Figure(figsize=(4.6 * columns, (3.3 + 0.15 * longest) * lines), layout="constrained")
    axes = list(figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True).flat)
    for axis, panel in zip(axes, panels, strict=False):
        for method, points in references.items():
            if method not in panel.curves:
                axis.plot(*_line(points, read), color="0.75", linewidth=1, zorder=1)
        colours = mpl.colormaps["tab10" if len(panel.curves) <= 10 else "tab20"]
        for index, (method, points) in enumerate(panel.curves.items()):
            _curve(
                axis, points, read, _short(method.removeprefix(panel.prefix)), colours(index % colours.N), offset=index
            )
        if full is not None and not log:
            axis.axhline(full.mean, color="0.3", linestyle=":", linewidth=1)
        axis.set_title(panel.title)
        axis.set_xscale("log", base=2)
        axis.set_xlim(lowest / 1.3, highest * 1.3)
        axis.xaxis.set_major_formatter(_plain)
        if log:
            axis.set_yscale("log")
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.yaxis.set_minor_locator(NullLocator())
            axis.yaxis.set_major_formatter(_plain)
        axis.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.09), frameon=False)
        axis.tick_params(labelbottom=True, labelsize=7, which="both")
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    figure.supxlabel("keys and values held, share of the full cache")
    figure.supylabel(label)
    return figure


@dataclass(frozen=True)
class _Panel:
    title: str
    prefix: str  # what its curves' names have in common
    curves: dict[str, list[Row]]


def _panels(rows: Sequence[Row]) -> list[_Panel]:
    """Methods that were measured at several budgets, the plain policies first."""
    methods: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        if row.config is not None:
            methods[row.method].append(row)
    curves = {
        method: sorted(points, key=lambda row: row.bytes_fraction)
        for method, points in methods.items()
        if len(points) > 1
    } or dict(methods)
    plain: dict[str, list[Row]] = {}
    by_policy: dict[str, dict[str, list[Row]]] = defaultdict(dict)
    for method, points in curves.items():
        config = points[0].config
        assert config is not None
        by_policy[config["policy"]][method] = points
        if config["representative_share"] == 0 and config["page_size"] == 1:
            plain[method] = points
    panels = [_Panel("importance alone, tokens", "", plain)] if plain else []
    panels += [
        _Panel(policy, f"{policy}:", found)
        for policy, found in by_policy.items()
        if len(found) > 1 or not found.keys() <= plain.keys()
    ]
    return panels


def _short(name: str, limit: int = 90) -> str:
    """Longer names would leave no room for the plot."""
    name = " ".join(name.split())
    return name if len(name) <= limit else name[: limit - 3] + "..."


def _plain(value: float, _: object) -> str:
    return f"{value:.3g}"


def _line(points: list[Row], read: Callable[[Row], Estimate | None]) -> tuple[list[float], list[float]]:
    return [row.bytes_fraction for row in points], [found.mean for row in points if (found := read(row)) is not None]


def _curve(
    axis: Axes, points: list[Row], read: Callable[[Row], Estimate | None], label: str, colour: Any, offset: int
) -> None:
    found = [estimate for row in points if (estimate := read(row)) is not None]
    # Curves of equal bytes would hide each other's intervals.
    x = [row.bytes_fraction * 1.012**offset for row in points]
    spread = [[e.mean - e.low for e in found], [e.high - e.mean for e in found]]
    means = [e.mean for e in found]
    axis.errorbar(x, means, yerr=spread, label=label, color=colour, marker="o", markersize=3, linewidth=1.2, capsize=2)


def _differences(rows: Sequence[Row], read: Callable[[Row], Comparison | None], label: str) -> Figure | None:
    """Per-sample differences as boxes (quartiles, whiskers to 5 and 95 %), their mean and its interval as a dot."""
    found = [(row, comparison) for row in rows if (comparison := read(row)) is not None]
    if not found:
        return None
    height = 0.24 * len(found) + 1.1
    figure = Figure(figsize=(11, height), layout="constrained")
    axis = figure.subplots()
    values = [[v for task in comparison.values.values() for v in task] for _, comparison in found]
    places = list(range(len(found), 0, -1))
    axis.boxplot(
        values,
        positions=places,
        orientation="horizontal",
        whis=(5, 95),
        showfliers=False,
        widths=0.55,
        medianprops={"color": "0.4"},
        boxprops={"color": "0.6"},
        whiskerprops={"color": "0.6"},
        capprops={"color": "0.6"},
    )
    for place, (_, comparison) in zip(places, found, strict=True):
        estimate = comparison.estimate
        colour = "tab:red" if estimate.excludes_zero else "tab:blue"
        axis.errorbar(
            estimate.mean,
            place,
            xerr=[[estimate.mean - estimate.low], [estimate.high - estimate.mean]],
            color=colour,
            marker="o",
            markersize=4,
            capsize=3,
            zorder=3,
        )
    axis.axvline(0, color="0.2", linewidth=0.8)
    axis.set_yticks(places, [_short(row.name) for row, _ in found], fontsize=7)
    axis.set_xlabel(f"{label}\n(box: samples; dot: mean and 95 % interval, red where it excludes 0)")
    return figure
