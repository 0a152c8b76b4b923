"""Files of tensors with a header of text, in which caches and profiles are kept: safetensors, never code."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ._version import __version__
from .errors import CrushError, one_line
from .files import looks_like, replacing
from .fingerprint import digest_of


@dataclass(frozen=True)
class FileKind:
    """One kind of file.

    Attributes:
        noun: what it holds, in one word.
        version: changes whenever older code could not read a file, or newer code an older one.
        writers: what writes such files, for messages.
        remedy: what to do about a file of another version.
        error: what is raised where a file cannot be used.
    """

    noun: str
    version: str
    writers: str
    remedy: str
    error: type[CrushError]

    def write(self, path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        """Writes the whole file or leaves what was there.

        Raises:
            OutputError: it cannot be written.
        """
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        shared = set[int]()
        for name, tensor in tensors.items():  # safetensors takes no two tensors in the same memory
            if (place := tensor.untyped_storage().data_ptr()) in shared:
                tensors[name] = tensor.clone()
            shared.add(place)
        header = {"format": f"crushkv {self.noun}", "format_version": self.version, "crushkv": __version__, **metadata}
        with replacing(path) as temporary:
            save_file(tensors, temporary, header | {"digest": _digest(tensors, header)})

    def read(self, path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
        """The header and the tensors of a file that `write` wrote.

        Raises:
            CrushError: `error`, where the file cannot be read, is damaged or comes from another version.
        """
        header, tensors = self._open(path, with_tensors=True)
        if header.pop("digest", None) != _digest(tensors, header):
            raise self.error(f"{path}: damaged: its contents are not those that were written")
        return header, tensors

    def read_header(self, path: Path) -> dict[str, str]:
        """The header alone, without a look at the tensors.

        Raises:
            CrushError: see `read`.
        """
        return self._open(path, with_tensors=False)[0]

    def _open(self, path: Path, with_tensors: bool) -> tuple[dict[str, str], dict[str, Tensor]]:
        try:
            with safe_open(path, framework="pt") as file:
                header: dict[str, str] = dict(file.metadata() or {})
                if header.get("format") != f"crushkv {self.noun}":
                    raise self.error(f"{path}: this is no {self.noun} of crushkv")
                if header.get("format_version") != self.version:
                    raise self.error(
                        f"{path}: written by crushkv {header.get('crushkv')} in format {header.get('format_version')}, "
                        f"this is crushkv {__version__} with format {self.version}: {self.remedy}"
                    )
                return header, {name: file.get_tensor(name) for name in (file.keys() if with_tensors else ())}
        except CrushError:
            raise
        except OSError as error:
            raise self.error(f"{path}: {error}") from None
        except Exception as error:  # safetensors raises its own kind, and others for some damages
            try:
                looks = looks_like(path)
            except OSError:
                looks = "nothing that can be read"
            raise self.error(
                f"{path}: expected a file that {self.writers} has written; this looks like {looks} "
                f"({one_line(str(error))})"
            ) from None


def _digest(tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> str:
    return digest_of(tensors, json.dumps(header, sort_keys=True))
