"""One self-contained page about some results."""

from __future__ import annotations

import base64
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from .pages import environment
from .plots import as_svg, figures
from .results import Sample, by_model
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
    models = by_model(samples)

    def label(name: str, model: str) -> str:
        return f"{name}, {model}" if len(models) > 1 else name

    templates = environment()
    templates.filters.update(
        estimate=_estimate,
        interval=_interval,
        change=_change,
        prompt=_prompt,
        label=lambda row: label(row.name, row.model),
    )
    plots = [
        {"name": name, "title": _title(name, list(models)), "data": base64.b64encode(as_svg(figure).encode()).decode()}
        for name, figure in figures(table).items()
    ]
    return templates.get_template("report.html.j2").render(
        title=title,
        rows=table,
        plots=plots,
        task_names=list(dict.fromkeys(sample.task for sample in samples)),
        tasks=[_task(label(task, model), own) for model, of in models.items() for task, own in _by_task(of).items()],
        model_names=list(models),
        models=[of[0].model for of in models.values()],
        has_scores=any(row.score is not None for row in table),
        has_fidelity=any(row.kl is not None for row in table),
        samples=len(samples),
        versions=samples[0].versions,
        settings=_settings(samples),
    )


def _title(name: str, models: list[str]) -> str:
    """Of a plot that `figures` has named."""
    if name in TITLES:
        return TITLES[name]
    kind, _, number = name.rpartition("-")
    return f"{TITLES[kind]}: {models[int(number) - 1]}"


def _by_task(samples: Sequence[Sample]) -> dict[str, list[Sample]]:
    found: dict[str, list[Sample]] = defaultdict(list)
    for sample in samples:
        found[sample.task].append(sample)
    return found


def _task(label: str, samples: Sequence[Sample]) -> dict[str, Any]:
    """What a model was given of a task."""
    lengths = sorted({sample.id: sample.prompt_tokens for sample in samples}.values())
    return {
        "name": label,
        "prompts": len(lengths),
        "shortest": lengths[0],
        "longest": lengths[-1],
        "metric": next((sample.metric for sample in samples if sample.metric), None),
    }


def _settings(samples: Sequence[Sample]) -> dict[str, str]:
    """Each setting of the sweeps with its values."""
    found: dict[str, dict[str, None]] = {}
    for sample in samples:
        for name, value in sample.settings.items():
            text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
            found.setdefault(name, {})[text] = None
    return {name: "; ".join(values) for name, values in found.items()}


def _estimate(value: Estimate | None, digits: int = 4, what: str = "mean") -> str:
    return "" if value is None else f"{getattr(value, what):.{digits}f}"


def _prompt(sample: Sample | None) -> str:
    return "" if sample is None else f"{sample.task} {sample.id}"


def _interval(value: Estimate | None, digits: int = 4) -> str:
    return "" if value is None else f"{value.low:.{digits}f} to {value.high:.{digits}f}"


def _change(value: Comparison | None, digits: int = 4) -> str:
    if value is None:
        return ""
    e = value.estimate
    return f"{e.mean:+.{digits}f} ({e.low:+.{digits}f} to {e.high:+.{digits}f})"
