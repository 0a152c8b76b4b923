"""Means over tasks with bootstrap intervals, medians and worst prompts, and paired differences of configurations."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import bootstrap

from ..config import CrushConfig
from .results import Sample

RESAMPLES = 4000
# Fields that say which representatives KVCrush takes; without them a configuration is importance alone.
KVCRUSH_FIELDS = (
    "representative_share",
    "anchor",
    "grouping",
    "representative_bits",
)


@dataclass(frozen=True)
class Estimate:
    """The mean and the spread of some prompts.

    Attributes:
        mean: of the tasks' means, so that each task counts alike.
        low, high: the mean's 95 % interval. If no task has two prompts, both are the mean, and say nothing.
        median, percentile_95, highest: of all prompts, each counting alike. They show a lost prompt; a mean hides it.
        prompts: how many there are.
    """

    mean: float
    low: float
    high: float
    median: float
    percentile_95: float
    highest: float
    prompts: int

    @property
    def excludes_zero(self) -> bool:
        return (self.low > 0 or self.high < 0) and self.low < self.high


@dataclass(frozen=True)
class Comparison:
    """A configuration against another on the prompts that both have: `values[task]` holds the differences."""

    estimate: Estimate
    values: Mapping[str, Sequence[float]]


def macro_mean(by_task: Mapping[str, Sequence[float]], seed: int = 0) -> Estimate:
    """The mean of the tasks' means, each task counting alike, and the spread of the prompts.

    The interval is a percentile bootstrap, prompts drawn within their task (Efron and Tibshirani 1993, chapter 13). A
    task with a single prompt adds nothing to its width.

    Raises:
        ValueError: there are no values.
    """
    groups = [np.asarray(values, dtype=float) for values in by_task.values() if len(values)]
    if not groups:
        raise ValueError("no values to average")
    mean = float(np.mean([group.mean() for group in groups]))
    drawn = [group for group in groups if len(group) > 1]
    low, high = _interval(groups, drawn, seed) if drawn else (mean, mean)
    every = np.concatenate(groups)
    median, percentile_95, highest = (float(value) for value in np.percentile(every, [50, 95, 100]))
    return Estimate(mean, low, high, median, percentile_95, highest, len(every))


def _interval(groups: Sequence[Any], drawn: Sequence[Any], seed: int) -> tuple[float, float]:
    """The interval of the mean of all groups' means. It draws prompts within the groups that have several."""
    fixed = sum(float(group[0]) for group in groups if len(group) == 1)

    def of_means(*samples: Any, axis: int = -1) -> Any:
        return (sum(sample.mean(axis=axis) for sample in samples) + fixed) / len(groups)

    interval = bootstrap(
        drawn, of_means, n_resamples=RESAMPLES, method="percentile", rng=np.random.default_rng(seed), vectorized=True
    ).confidence_interval
    return float(interval.low), float(interval.high)


Read = Callable[[Sample], float | None]


def by_task(samples: Iterable[Sample], read: Read) -> dict[str, list[float]]:
    """The values that `read` finds in the samples, by task."""
    values: dict[str, list[float]] = defaultdict(list)
    for sample in samples:
        if (value := read(sample)) is not None:
            values[sample.task].append(value)
    return dict(values)


def worst_prompt(samples: Iterable[Sample]) -> Sample | None:
    """The sample with the highest KL. None: it was not measured."""
    measured = [sample for sample in samples if sample.kl is not None]
    return max(measured, key=lambda sample: sample.kl or 0, default=None)


def summary(name: str, samples: Sequence[Sample]) -> dict[str, Any]:
    """Means over the tasks with 95 % intervals, each task counting alike; KL's median, 95th percentile and worst.

    `gold_nll` is None without gold answers.
    """
    worst = worst_prompt(samples)
    assert worst is not None
    kl = macro_mean(by_task(samples, lambda sample: sample.kl))
    nll = by_task(samples, lambda sample: sample.gold_nll)
    return {
        "name": name,
        "kl": kl.mean,
        "kl_interval": [kl.low, kl.high],
        "kl_median": kl.median,
        "kl_percentile_95": kl.percentile_95,
        "kl_worst": kl.highest,
        "worst_prompt": {"task": worst.task, "id": worst.id},
        "agreement": macro_mean(by_task(samples, lambda sample: sample.agreement)).mean,
        "gold_nll": macro_mean(nll).mean if nll else None,
        "bytes_fraction": sum(sample.bytes_fraction for sample in samples) / len(samples),
        "prompts": len(samples),
    }


def paired(samples: Iterable[Sample], baseline: Iterable[Sample], read: Read) -> Comparison | None:
    """`samples` minus `baseline`, prompt by prompt. None: they have no prompt in common."""
    other = {_prompt(sample): read(sample) for sample in baseline}
    differences: dict[str, list[float]] = defaultdict(list)
    for sample in samples:
        value, base = read(sample), other.get(_prompt(sample))
        if value is not None and base is not None:
            differences[sample.task].append(value - base)
    return Comparison(macro_mean(differences), dict(differences)) if differences else None


def _prompt(sample: Sample) -> tuple[str, str, str]:
    return sample.task, sample.id, sample.prompt_hash


def importance_only(config: Mapping[str, Any]) -> dict[str, Any]:
    """The same configuration without representatives."""
    defaults = CrushConfig().to_dict()
    plain = {name: defaults[name] for name in KVCRUSH_FIELDS}
    return {**config, **plain, "representative_share": 0}
