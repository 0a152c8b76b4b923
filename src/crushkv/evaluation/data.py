"""Reads lines of JSON. A damaged line is named in a warning and left out."""

from __future__ import annotations

import gzip
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import CrushError


class DataError(CrushError):
    """A file of data or results cannot be used."""


def read_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line number and object of each line of a `.jsonl` file (or `.jsonl.gz`); empty lines are skipped.

    A line that is no JSON object is left out, with a warning that names file and line.

    Raises:
        DataError: the file cannot be read.
    """
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip() and (record := _object(line, path, number)) is not None:
                    yield number, record
    except (OSError, EOFError) as error:
        raise DataError(f"{path}: {error}") from None


def _object(line: bytes, path: Path, number: int) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
        if isinstance(record, dict):
            return record
        reason = "no JSON object"
    except (ValueError, RecursionError) as error:  # bytes that are no UTF-8 included
        reason = f"damaged or truncated ({error})"
    warnings.warn(f"crushkv: {path}:{number}: {reason}; the line is left out", stacklevel=2)
    return None
