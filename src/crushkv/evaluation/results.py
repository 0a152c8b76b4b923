"""Results: one JSON line a sample, written as it is measured, and what may stand together in one report."""

from __future__ import annotations

import hashlib
import io
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from ..config import CrushConfig
from .data import DataError, read_lines


@dataclass(frozen=True)
class Sample:
    """One configuration on one prompt, with all that is needed to measure it again.

    Attributes:
        task, id: the prompt. prompt_hash: of its text.
        name: of the configuration. config: all its fields; None is the full cache.
        settings: of the sweep, as far as they bear on the figures.
        bytes_held, bytes_full: keys and values after the prompt, here and in the full cache; both with the same number
            of bytes (two) for a number in the model's dtype.
        kl, agreement, gold_nll, answer_tokens: see `Fidelity`; None where not measured.
        score, metric, answer: of the generated answer; None where not measured.
        model, versions: what ran.
    """

    task: str
    id: str
    prompt_hash: str
    prompt_tokens: int
    name: str
    config: dict[str, Any] | None
    settings: dict[str, Any]
    bytes_held: int
    bytes_full: int
    model: dict[str, Any]
    versions: dict[str, Any]
    kl: float | None = None
    agreement: float | None = None
    gold_nll: float | None = None
    answer_tokens: int | None = None
    score: float | None = None
    metric: str | None = None
    answer: str | None = None

    @property
    def model_name(self) -> str:
        return str(self.model.get("name"))

    @property
    def bytes_fraction(self) -> float:
        """Both caches have the same dtype, so that the ratio is the one at 16 bits a number."""
        return self.bytes_held / self.bytes_full

    @property
    def key(self) -> str:
        """The same for what would be measured again."""
        return sample_key(self.task, self.id, self.prompt_hash, self.config, self.settings)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Sample:
        """Raises `TypeError` or `ValueError` where a field is missing or none of ours."""
        sample = cls(**values)
        if not isinstance(sample.task, str) or not isinstance(sample.name, str) or sample.bytes_full <= 0:
            raise ValueError("fields of the wrong kind")
        return sample


def prompt_hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def sample_key(
    task: str, id: str, text_hash: str, config: CrushConfig | Mapping[str, Any] | None, settings: Mapping[str, Any]
) -> str:
    fields = config.to_dict() if isinstance(config, CrushConfig) else config
    return json.dumps([task, id, text_hash, fields, settings], sort_keys=True)


class ResultsFile:
    """Appends samples to a file, and knows which it has. A context manager.

    Without a path, it keeps the samples in memory only.

    Raises:
        DataError: the file cannot be read or written, or its samples come from another model or other versions.
    """

    def __init__(self, path: Path | None, model: dict[str, Any], versions: dict[str, Any]) -> None:
        self.path = path
        self.samples = read_samples([path]) if path is not None and path.exists() else []
        for sample in self.samples:
            if (sample.model, sample.versions) != (model, versions):
                raise DataError(
                    f"{path}: its samples were measured with {_describe(sample.model, sample.versions)}, this run has "
                    f"{_describe(model, versions)}: give another file"
                )
        self._keys = {sample.key for sample in self.samples}
        self._file: Any = io.BytesIO()
        if path is None:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a+b", buffering=0)  # what cannot be written must not be tried again at the end
            self._begin_line()
        except OSError as error:
            raise DataError(f"{path}: {error}") from None

    def _begin_line(self) -> None:
        """A line that was cut off by an interruption is ended, so that it damages nothing but itself."""
        if self._file.seek(0, 2):
            self._file.seek(-1, 2)
            if self._file.read(1) != b"\n":
                self._file.write(b"\n")

    def __contains__(self, key: str) -> bool:
        return key in self._keys

    def add(self, sample: Sample) -> None:
        """Writes one line.

        Raises:
            DataError: it cannot be written; what was written before stays.
        """
        line = json.dumps(asdict(sample), ensure_ascii=False, allow_nan=False) + "\n"
        try:
            rest = line.encode("utf-8", "replace")
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            raise DataError(
                f"{self.path}: {error}; the {len(self.samples)} samples before are kept, and the same command goes on "
                "from there"
            ) from None
        self.samples.append(sample)
        self._keys.add(sample.key)

    def __enter__(self) -> ResultsFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def read_samples(paths: Iterable[Path]) -> list[Sample]:
    """All samples of some result files; a damaged line is named in a warning and left out.

    Raises:
        DataError: a file cannot be read, or a line is no sample of this version of crushkv.
    """
    samples = []
    for path in paths:
        for number, record in read_lines(path):
            try:
                samples.append(Sample.from_dict(record))
            except (TypeError, ValueError) as error:
                raise DataError(f"{path}:{number}: no sample of `crushkv sweep` ({error})") from None
    return samples


def read_report_samples(paths: Iterable[Path]) -> list[Sample]:
    """Samples that may stand in one report, each measured once. They may be of several models, told apart by name.

    Raises:
        DataError: also where models of one name differ, or versions, or configurations of one name, or there are no
            samples.
    """
    merged: dict[tuple[str, str, str, str, str], Sample] = {}
    models: dict[str, tuple[Path, Sample]] = {}
    configs: dict[str, dict[str, Any] | None] = {}
    for path in paths:
        for sample in read_samples([path]):
            known = models.setdefault(sample.model_name, (path, sample))
            _check_alike(path, sample, *known)
            _check_alike(path, sample, *next(iter(models.values())), other_model=True)
            if configs.setdefault(sample.name, sample.config) != sample.config:
                raise DataError(f"{path}: configuration {sample.name!r} stands for two different configurations")
            key = (sample.model_name, sample.task, sample.id, sample.prompt_hash, sample.name)
            merged[key] = _merge(merged[key], sample) if key in merged else sample
    if not merged:
        raise DataError("there are no samples in these results")
    return list(merged.values())


def _check_alike(path: Path, sample: Sample, known_path: Path, known: Sample, other_model: bool = False) -> None:
    """Raises `DataError` unless both were measured with the same versions, and the same model where that is asked."""
    if sample.versions != known.versions or (sample.model != known.model and not other_model):
        raise DataError(
            f"{path} was measured with {_describe(sample.model, sample.versions)}, but {known_path} with "
            f"{_describe(known.model, known.versions)}: they do not belong in one report"
        )


def by_model(samples: Iterable[Sample]) -> dict[str, list[Sample]]:
    """The samples of each model, by its name, in the order of their first samples."""
    found: dict[str, list[Sample]] = defaultdict(list)
    for sample in samples:
        found[sample.model_name].append(sample)
    return dict(found)


def _merge(first: Sample, second: Sample) -> Sample:
    """Fidelity may come from one sweep and the score from another."""
    a, b = asdict(first), asdict(second)
    return Sample(**{name: a[name] if a[name] is not None else b[name] for name in a})


def _describe(model: Mapping[str, Any], versions: Mapping[str, Any]) -> str:
    packages = ", ".join(f"{name} {version}" for name, version in versions.items())
    return f"{model.get('name')} ({model.get('dtype')}, {model.get('device')}; {packages})"
