"""Time and memory against the length of the prompt, one curve a method, as a matplotlib figure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Plot

from ..errors import ConfigError
from .summary import Figure, Spread

_STYLE = {"text.parse_math": False, "font.size": 9, "axes.grid": True, "grid.alpha": 0.3}
_PANELS: tuple[tuple[str, float, Callable[[Figure], Spread | None]], ...] = (
    ("time to first token [s]", 1.0, lambda figure: figure.ttft),
    ("time per output token [ms]", 1e-3, lambda figure: figure.tpot),
    ("keys and values held [MiB]", 2.0**20, lambda figure: figure.kv_bytes),
    ("peak memory since the prompt [MiB]", 2.0**20, lambda figure: figure.peak_above_start),
)


def plot(figures: Sequence[Figure]) -> Plot:
    """A line of panels for each batch size."""
    batches = sorted({figure.batch for figure in figures})
    names = list(dict.fromkeys(figure.name for figure in figures))
    colormap = mpl.colormaps["tab10" if len(names) <= 10 else "tab20"]
    colours = {name: colormap(number % colormap.N) for number, name in enumerate(names)}
    with mpl.rc_context(_STYLE):  # type: ignore[arg-type]
        size = (3.6 * len(_PANELS), 3.1 * len(batches) + 0.22 * len(names) + 0.2)
        drawn = Plot(figsize=size, layout="constrained")
        axes = drawn.subplots(len(batches), len(_PANELS), squeeze=False)
        for line, batch in zip(axes, batches, strict=True):
            for axis, (label, unit, read) in zip(line, _PANELS, strict=True):
                _panel(axis, [figure for figure in figures if figure.batch == batch], unit, read, colours)
                axis.set_title(label if len(batches) == 1 else f"{label}, batch of {batch}", fontsize=9)
                axis.set_xlabel("prompt [tokens]")
        handles = {h.get_label(): h for axis in axes.flat for h in axis.get_lines()}
        shown = [name for name in names if name in handles]
        drawn.legend([handles[name] for name in shown], shown, loc="outside lower center", ncols=3, frameon=False)
    return drawn


def save(drawn: Plot, folder: Path, name: str = "benchmark") -> list[Path]:
    """Writes a PNG and an SVG.

    Raises:
        ConfigError: the folder cannot be written.
    """
    files = [folder / f"{name}.{kind}" for kind in ("png", "svg")]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with mpl.rc_context(_STYLE):  # type: ignore[arg-type]
            for file in files:
                drawn.savefig(file, dpi=120)
    except OSError as error:
        raise ConfigError(f"{folder}: {error}") from None
    return files


def _panel(
    axis: Axes,
    figures: Sequence[Figure],
    unit: float,
    read: Callable[[Figure], Spread | None],
    colours: Mapping[str, Any],
) -> None:
    curves: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for figure in figures:
        if (spread := read(figure)) is not None:
            curves[figure.name].append((figure.tokens, spread.median / unit))
    for name, points in curves.items():
        x, y = zip(*sorted(points), strict=True)
        axis.plot(x, y, label=name, color=colours[name], marker="o", markersize=3, linewidth=1.2)
    axis.set_xscale("log", base=2)
    axis.set_xticks(sorted({figure.tokens for figure in figures}))
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:.0f}")
    axis.set_ylim(bottom=0)
