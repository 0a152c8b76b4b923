"""Files that commands write."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from ..errors import CrushError


class OutputError(CrushError):
    """A file cannot be written."""


def write_text(path: Path, text: str) -> None:
    """Writes the whole file or leaves what was there.

    Raises:
        OutputError: it cannot be written.
    """
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
            # mkstemp makes files that only their owner reads
            umask = os.umask(0)
            os.umask(umask)
            os.chmod(temporary, 0o666 & ~umask)
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise OutputError(f"{path}: {error}") from None
