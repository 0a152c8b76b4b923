"""One self-contained page about some results."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

from .pages import environment
from .plots import as_svg, figures
from .results import Sample
from .statistics import Comparison, Estimate
from .tables import Row, rows

TITLES = {
    "kl-by-bytes": "Fidelity against bytes",
    "score-by-bytes": "Task score against bytes",
    "score-to-full": "Task score, sample by sample, against the full cache",
    "kl-to-importance-only": "What the representatives change: KL, sample by sample",
    "score-to-importance-only": "What the representatives change: task score, sample by sample",
}


def render(
    samples: Sequence[Sample],
    title: str = "KVCrush: what a smaller cache costs",
    table: Sequence[Row] | None = None,
) -> str:
    """HTML with tables, plots and the environment; it loads nothing.

    table: `rows(samples)`, where the caller has them; their intervals take a while.
    """
    table = rows(samples) if table is None else table
    first = samples[0]
    templates = environment()
    templates.filters.update(estimate=_estimate, interval=_interval, change=_change)
    plots = [
        {"name": name, "title": TITLES[name], "data": base64.b64encode(as_svg(figure).encode()).decode()}
        for name, figure in figures(table).items()
    ]
    tasks = list(dict.fromkeys(sample.task for sample in samples))
    return templates.get_template("report.html.j2").render(
        title=title,
        rows=table,
        plots=plots,
        tasks=[_task(task, samples) for task in tasks],
        has_scores=any(row.score is not None for row in table),
        has_fidelity=any(row.kl is not None for row in table),
        samples=len(samples),
        model=first.model,
        versions=first.versions,
        settings=_settings(samples),
    )


def _task(task: str, samples: Sequence[Sample]) -> dict[str, Any]:
    mine = [sample for sample in samples if sample.task == task]
    lengths = sorted({sample.id: sample.prompt_tokens for sample in mine}.values())
    metric = next((sample.metric for sample in mine if sample.metric), None)
    return {"name": task, "prompts": len(lengths), "shortest": lengths[0], "longest": lengths[-1], "metric": metric}


def _settings(samples: Sequence[Sample]) -> dict[str, str]:
    """Each setting of the sweeps with its values."""
    found: dict[str, dict[str, None]] = {}
    for sample in samples:
        for name, value in sample.settings.items():
            text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
            found.setdefault(name, {})[text] = None
    return {name: "; ".join(values) for name, values in found.items()}


def _estimate(value: Estimate | None, digits: int = 4) -> str:
    return "" if value is None else f"{value.mean:.{digits}f}"


def _interval(value: Estimate | None, digits: int = 4) -> str:
    return "" if value is None else f"{value.low:.{digits}f} to {value.high:.{digits}f}"


def _change(value: Comparison | None, digits: int = 4) -> str:
    if value is None:
        return ""
    e = value.estimate
    return f"{e.mean:+.{digits}f} ({e.low:+.{digits}f} to {e.high:+.{digits}f})"
