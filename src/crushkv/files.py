"""Files that are there as a whole or not at all."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from .errors import CrushError


class OutputError(CrushError):
    """A file cannot be written."""


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file in the same folder, which takes the place of `path` at the end, if nothing went wrong.

    Raises:
        OutputError: it cannot be written; what was there before is left as it was.
    """
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
        os.close(handle)
        temporary = Path(name)
        try:
            yield temporary
            # mkstemp makes files that only their owner reads
            umask = os.umask(0)
            os.umask(umask)
            temporary.chmod(0o666 & ~umask)
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise OutputError(f"{path}: {error}") from None


def write_text(path: Path, text: str) -> None:
    """Writes the whole file or leaves what was there.

    Raises:
        OutputError: it cannot be written.
    """
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def cache_folder() -> Path:
    """The user's: `$CRUSHKV_CACHE`, else `crushkv` in `$XDG_CACHE_HOME`, else `~/.cache/crushkv`."""
    own = os.environ.get("CRUSHKV_CACHE")
    if own:
        return Path(own).expanduser().absolute()
    shared = os.environ.get("XDG_CACHE_HOME", "")
    # A relative path there is to be ignored, says the XDG specification.
    return (Path(shared) if os.path.isabs(shared) else Path("~/.cache").expanduser()) / "crushkv"
