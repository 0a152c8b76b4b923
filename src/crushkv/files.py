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


_SAMPLE = 65536  # bytes
_KINDS = (
    (b"%PDF-", "a PDF file: extract its text first, for example with pdftotext"),
    (b"PK\x03\x04", "a ZIP archive, or a document of an office program: save it as plain text first"),
    (b"\xd0\xcf\x11\xe0", "a document of an office program: save it as plain text first"),
    (b"\x1f\x8b", "a gzip file: unpack it first"),
    (b"\x89PNG", "a picture"),
    (b"\xff\xd8\xff", "a picture"),
    (b"GIF8", "a picture"),
    (b"{\\rtf", "a rich text document: save it as plain text first"),
    (b"\xff\xfe", "text in UTF-16: convert it first, for example with iconv -f UTF-16 -t UTF-8"),
    (b"\xfe\xff", "text in UTF-16: convert it first, for example with iconv -f UTF-16 -t UTF-8"),
)


def looks_like(source: Path | bytes) -> str:
    """What a file seems to be, from its first bytes, with what to do about it where text is expected.

    Raises:
        OSError: it cannot be read.
    """
    if isinstance(source, bytes):
        data = source[:_SAMPLE]
    else:
        with source.open("rb") as file:
            data = file.read(_SAMPLE)
    if not data:
        return "an empty file"
    for start, kind in _KINDS:
        if data.startswith(start):
            return kind
    zeros = data.count(0)
    if zeros and max(data[0::2].count(0), data[1::2].count(0)) > 0.3 * len(data):
        return _KINDS[-1][1]
    strange = sum(data.count(code) for code in range(32) if code not in b"\t\n\r\f\x1b")
    if zeros or strange > 0.02 * len(data):
        return "binary data"
    try:
        data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if error.start < len(data) - 4:  # not a character that the sample has cut
            return "text in Latin-1 or Windows-1252: convert it first, for example with iconv -f CP1252 -t UTF-8"
    return "text"


def text_of(data: bytes) -> str:
    """The text of bytes in UTF-8.

    Raises:
        ValueError: they are something else; the message says what they look like.
    """
    looks = looks_like(data)
    if looks in ("text", "an empty file"):
        try:
            return data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            looks = f"text with a byte of another encoding, {data[error.start]:#04x} at {error.start}"
    raise ValueError(f"expected text in UTF-8; this looks like {looks}")
