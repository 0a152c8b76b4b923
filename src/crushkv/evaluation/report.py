"""One self-contained page about some results."""

from __future__ import annotations

import base64
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from ..presets import PRESETS
from .pages import environment
from .plots import TITLES, as_svg, figures
from .results import Sample, by_model
from .statistics import Estimate
from .tables import Row, rows


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

    templates = environment()
    templates.filters.update(estimate=_estimate, interval=_interval, prompt=_prompt)
    drawn = {dark: figures(table, dark) for dark in (False, True)}
    plots = [
        {"name": name, "title": TITLES[name], "light": _data(drawn[False][name], False), "dark": _data(figure, True)}
        for name, figure in drawn[True].items()
    ]
    return templates.get_template("report.html.j2").render(
        title=title,
        rows=table,
        plots=plots,
        task_names=list(dict.fromkeys(sample.task for sample in samples)),
        tasks=[
            _task(f"{task}, {model}" if len(models) > 1 else task, own)
            for model, of in models.items()
            for task, own in _by_task(of).items()
        ],
        model_names=list(models),
        presets=PRESETS,
        models=[of[0].model for of in models.values()],
        has_scores=any(row.score is not None for row in table),
        has_fidelity=any(row.kl is not None for row in table),
        has_kl_to_base=any(row.kl_to_base is not None for row in table),
        has_score_to_base=any(row.score_to_base is not None for row in table),
        samples=len(samples),
        versions=samples[0].versions,
        settings=_settings(samples),
    )


def _data(figure: Figure, dark: bool) -> str:
    return base64.b64encode(as_svg(figure, dark).encode()).decode()


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
