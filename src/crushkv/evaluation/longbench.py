"""The harness's LongBench tasks over local files instead of the Hub's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import ConfigError, nearest
from .data import DataError, read_lines

PREFIX = "longbench_"
# What the harness's prompts and metrics read.
_TEXT = ("context", "dataset")


def local_task(name: str, folder: Path, known: set[str]) -> dict[str, Any]:
    """Overrides that point the harness's task at `folder/name.jsonl` (LongBench's format).

    The records' `dataset` says which LongBench task prompts and scores them, so that a file may have any name.

    Args:
        known: names of the harness's tasks.

    Raises:
        ConfigError: there is no such file.
        DataError: the file has no usable records, or records without gold answers.
    """
    if not folder.is_dir():
        raise ConfigError(f"data folder {str(folder)!r}: there is no such folder")
    path = folder / f"{name}.jsonl"
    if not path.is_file():
        files = sorted(file.stem for file in folder.glob("*.jsonl"))
        if not files:
            raise ConfigError(f"data folder {str(folder)!r}: there are no .jsonl files in it")
        raise ConfigError(f"task {name!r}: {path} does not exist.{nearest(name, files)}")
    records = _records(path)
    dataset = records[0]["dataset"]
    if PREFIX + dataset not in known:
        datasets = [task.removeprefix(PREFIX) for task in known if task.startswith(PREFIX)]
        raise DataError(f"{path}: dataset {dataset!r} is no LongBench task.{nearest(dataset, datasets)}")
    return {
        "task": PREFIX + dataset,
        "task_alias": name,
        "custom_dataset": lambda **_: {"test": _as_dataset(records)},
        "dataset_path": "",
        "dataset_name": "",
    }


def _records(path: Path) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = []
    for number, record in read_lines(path):
        where = f"{path}:{number}"
        for field in _TEXT:
            if not isinstance(record.get(field), str):
                raise DataError(f"{where}: the record has no {field!r}")
        question = record.get("question", record.get("input"))
        if not isinstance(question, str):
            raise DataError(f"{where}: the record has neither 'input' nor 'question'")
        answers = record.get("answers")
        if not isinstance(answers, list) or not answers or not all(isinstance(a, str) and a for a in answers):
            raise DataError(f"{where}: the record has no gold 'answers'")
        if records and record["dataset"] != records[0]["dataset"]:
            raise DataError(
                f"{where}: dataset {record['dataset']!r}, but the file began with {records[0]['dataset']!r}"
            )
        records.append(
            {
                "id": str(record.get("_id") or number),
                "context": record["context"],
                "question": question,
                "answers": answers,
                "all_classes": record.get("all_classes") or [],
                "dataset": record["dataset"],
            }
        )
    if not records:
        raise DataError(f"{path}: it holds no records")
    return records


def _as_dataset(records: list[dict[str, Any]]) -> Any:
    from datasets import Dataset

    return Dataset.from_list(records)
