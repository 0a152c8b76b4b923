"""A sweep: which configurations are measured on which prompts. Read from YAML, checked before anything runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

from ..config import CrushConfig
from ..config_text import parse_configs
from ..errors import ConfigError, nearest

Measure = Literal["fidelity", "score"]


@dataclass(frozen=True)
class Sweep:
    """What to measure.

    Attributes:
        tasks: names that `load_tasks` knows.
        configurations: name to configuration; None is the full cache. Braces in a sweep file's names stand for
            their alternatives: `{h2o,snapkv}:budget={0.5,0.25}`.
        measures: `fidelity` (near to the full cache?) and `score` (the task's metric of a generated answer).
        limit: prompts a task; None is all.
        min_prompt_tokens, max_prompt_tokens: prompts outside are left out, and counted.
        answer_tokens: how many tokens of the full cache's answer `fidelity` follows.
        max_new_tokens: longest generated answer, if the task's own limit is higher.
        chat: put prompts into the model's chat template.
        trim: cut spaces off the end of prompts; see `prompts`.
        batch: answers decoded together.
        seed: of the retrieval prompts.
    """

    tasks: tuple[str, ...]
    configurations: Mapping[str, CrushConfig | None]
    measures: tuple[Measure, ...] = ("fidelity",)
    limit: int | None = None
    min_prompt_tokens: int = 1
    max_prompt_tokens: int | None = None
    answer_tokens: int = 32
    max_new_tokens: int | None = None
    chat: bool = False
    trim: bool = False
    batch: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.tasks or not self.configurations:
            raise ConfigError("a sweep needs at least one task and one configuration")
        for name in ("limit", "min_prompt_tokens", "max_prompt_tokens", "answer_tokens", "max_new_tokens", "batch"):
            value = getattr(self, name)
            optional = name in ("limit", "max_prompt_tokens", "max_new_tokens")
            least = 2 if name == "answer_tokens" else 1
            if value is None and optional:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ConfigError(f"{name}={value!r}: accepted is an integer of at least {least}")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise ConfigError(f"seed={self.seed!r}: accepted is an integer")
        for name in ("chat", "trim"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name}={getattr(self, name)!r}: accepted is true or false")
        for measure in self.measures:
            if measure not in get_args(Measure):
                raise ConfigError(f"unknown measure {measure!r}.{nearest(str(measure), get_args(Measure))}")
        if not self.measures:
            raise ConfigError(f"measures: accepted are {' and '.join(get_args(Measure))}")

    @classmethod
    def load(cls, path: Path, overrides: Mapping[str, Any] | None = None) -> Sweep:
        """Reads a YAML file of the fields above; `overrides` replace what it says.

        Raises:
            ConfigError: names the file and what is wrong in it.
        """
        try:
            values = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ConfigError(f"sweep {str(path)!r}: {error}") from None
        try:
            if not isinstance(values, dict):
                raise ConfigError("expected a mapping with 'tasks' and 'configurations'")
            return cls.from_dict({**values, **(overrides or {})})
        except ConfigError as error:
            raise ConfigError(f"sweep {str(path)!r}: {error}") from None

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Sweep:
        fields = {f.name for f in dataclasses.fields(cls)}
        for name in values:
            if name not in fields:
                raise ConfigError(f"unknown field {name!r}.{nearest(str(name), fields)}")
        values = dict(values)
        for name in ("tasks", "measures"):
            if name in values:
                values[name] = tuple(_strings(name, values[name]))
        values["configurations"] = parse_configurations(_strings("configurations", values.get("configurations", [])))
        values.setdefault("tasks", ())
        return cls(**values)


def parse_configurations(texts: Sequence[str]) -> dict[str, CrushConfig | None]:
    """Configurations by name, with braces expanded. They evict nothing while decoding."""
    return {
        name: None if config is None else config.replace(interval=0) for name, config in parse_configs(texts).items()
    }


def _strings(name: str, value: Any) -> list[str]:
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, (list, tuple)) or not all(isinstance(v, str) for v in values):
        raise ConfigError(f"{name}={value!r}: accepted is a list of names")
    return list(values)
