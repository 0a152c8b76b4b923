"""The numbers of a report: a row for each model and configuration."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..config_text import split_name
from .results import Sample, by_model
from .statistics import Comparison, Estimate, by_task, importance_only, macro_mean, paired, worst_prompt


@dataclass(frozen=True)
class Row:
    """One configuration of one model over all its prompts.

    Attributes:
        model: its name.
        method: the configuration without its budget; a curve of the plots.
        bytes_fraction: mean over the prompts.
        kl, agreement, gold_nll, score: over all tasks, each counting alike. None: not measured.
        worst: the prompt with the highest KL. None: not measured.
        task_kl, task_score: means by task.
        score_to_full: paired difference to the full cache.
        kl_to_base, score_to_base: paired differences to the same configuration without representatives. None: this one
            has none, or the other was not measured.
        base: name of the configuration without representatives.
    """

    model: str
    name: str
    method: str
    config: dict[str, Any] | None
    prompts: int
    bytes_fraction: float
    kl: Estimate | None
    agreement: Estimate | None
    gold_nll: Estimate | None
    score: Estimate | None
    worst: Sample | None
    task_kl: dict[str, Estimate]
    task_score: dict[str, Estimate]
    score_to_full: Comparison | None
    kl_to_base: Comparison | None
    score_to_base: Comparison | None
    base: str | None


def _kl(sample: Sample) -> float | None:
    return sample.kl


def _score(sample: Sample) -> float | None:
    return sample.score


def _nll(sample: Sample) -> float | None:
    return sample.gold_nll


def rows(samples: Sequence[Sample]) -> list[Row]:
    """One row for each model and configuration, in the order of their first samples; models are never mixed."""
    return [row for model, own in by_model(samples).items() for row in _rows(model, own)]


def _rows(model: str, samples: Sequence[Sample]) -> list[Row]:
    groups: dict[str, list[Sample]] = defaultdict(list)
    for sample in samples:
        groups[sample.name].append(sample)
    by_config = {_key(group[0].config): name for name, group in groups.items()}
    full = next((group for group in groups.values() if group[0].config is None), None)
    return [_row(model, name, groups, by_config, full) for name in groups]


def _row(
    model: str,
    name: str,
    groups: dict[str, list[Sample]],
    by_config: dict[str, str],
    full: list[Sample] | None,
) -> Row:
    group = groups[name]
    config = group[0].config
    base = None
    if config is not None and config["representative_share"] != 0:
        base = by_config.get(_key(importance_only(config)))
    other = full if full is not None and config is not None else None
    return Row(
        model=model,
        name=name,
        method=method_of(name, config),
        config=config,
        prompts=len(group),
        bytes_fraction=sum(sample.bytes_fraction for sample in group) / len(group),
        kl=_mean(group, _kl),
        agreement=_mean(group, lambda sample: sample.agreement),
        gold_nll=_mean(group, _nll),
        score=_mean(group, _score),
        worst=worst_prompt(group),
        task_kl=_task_means(group, _kl),
        task_score=_task_means(group, _score),
        score_to_full=paired(group, other, _score) if other else None,
        kl_to_base=paired(group, groups[base], _kl) if base else None,
        score_to_base=paired(group, groups[base], _score) if base else None,
        base=base,
    )


def method_of(name: str, config: dict[str, Any] | None) -> str:
    """The configuration's name without its budget."""
    if config is None:
        return name
    policy, fields = split_name(name)
    rest = [field for field in fields.split(",") if field and not field.strip().startswith("budget=")]
    return f"{policy}:{','.join(rest)}" if rest else policy


def _mean(group: list[Sample], read: Any) -> Estimate | None:
    values = by_task(group, read)
    return macro_mean(values) if values else None


def _task_means(group: list[Sample], read: Any) -> dict[str, Estimate]:
    return {task: macro_mean({task: values}) for task, values in by_task(group, read).items()}


def _key(config: dict[str, Any] | None) -> str:
    """The same for 0 and 0.0."""
    numbers = (int, float)
    same = {k: float(v) if type(v) in numbers else v for k, v in config.items()} if config is not None else None
    return json.dumps(same, sort_keys=True)
