"""Profiles of models: how one is made, and where it is found and kept."""

from __future__ import annotations

import sys
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from ..core.heads import curve
from ..errors import UnsupportedModelError
from ..files import OutputError, cache_folder
from ..fingerprint import fingerprint
from ..profile import Profile, ProfileError
from .rope import find_ropes
from .support import trained_positions

TEXTS = ("essay", "code", "news", "dialogue")
TOKENS = 1200  # of each text
AGAIN = 600  # of them are read a second time
REPEAT = "\n\nRepeat the previous text exactly:\n\n"
LEAST_TOKENS = 128  # fewer tell nothing
FILE = "crushkv-profile.safetensors"  # beside a model's own files

Progress = Callable[[str], None]


def profile_model(
    model: Any, tokenizer: Any, progress: Progress | None = None, texts: Sequence[str] = TEXTS
) -> Profile:
    """Reads four texts that come with the package, the first half of each twice, and measures the energies of keys
    and queries, and how much each head looks back.

    Args:
        model: a Transformers model; nothing on it is changed.
        tokenizer: the model's own.
        progress: called with one line of text at each step.
        texts: which of the four are read.

    Raises:
        UnsupportedModelError: the model's cache cannot be compressed, or its layers' heads differ in size.
    """
    say = progress or (lambda line: None)
    limit = trained_positions(model.config) or TOKENS
    if limit < LEAST_TOKENS:
        raise UnsupportedModelError(f"a profile needs {LEAST_TOKENS} tokens of text, the model has {limit} positions")
    from .energies import SINK, Measured, measure  # its caches look for profiles

    between = torch.as_tensor(tokenizer(REPEAT, add_special_tokens=False)["input_ids"])
    again = min((limit - len(between)) // 2, AGAIN)
    length = min(limit - len(between) - again, TOKENS)
    ropes = find_ropes(model, length + len(between) + again)
    found: list[Measured] = []
    begin = time.monotonic()
    for done, name in enumerate(texts):
        left = (time.monotonic() - begin) / done * (len(texts) - done) if done else 0
        say(f"[{done + 1}/{len(texts)}] reading the {name}" + (f", about {left:.0f} s left" if done else ""))
        text = files("crushkv").joinpath("texts", f"{name}.txt").read_text(encoding="utf-8")
        ids = torch.as_tensor(tokenizer(text)["input_ids"])[:length]
        found.append(measure(model, ids, between, min(again, len(ids)), ropes))
    return Profile(
        keys=torch.stack([of.keys for of in found]).mean(0),
        queries=torch.stack([of.queries for of in found]).mean(0),
        # Sinks are kept in any case.
        needs=curve(torch.cat([of.scores[..., SINK:] for of in found], dim=-1)),
        model=fingerprint(model, any_dtype=True),
        model_type=str(model.config.model_type),
        texts=tuple(texts),
    )


def find_profile(model: Any, given: str | Path | None = None) -> Profile | None:
    """The profile in the given file; else beside the model, in the user's cache folder, or in the package.

    Raises:
        ProfileError: the given file, or the one beside the model, is damaged or of another model. One in the cache
            folder that is damaged is passed over.
    """
    if given is not None:
        return _checked(Path(given), model)
    folder = Path(model.config._name_or_path or "")
    if model.config._name_or_path and (folder / FILE).is_file():
        return _checked(folder / FILE, model)
    kept = kept_profile(model)
    if kept.is_file():
        try:
            return _checked(kept, model)
        except ProfileError:
            pass
    packaged = Path(str(files("crushkv").joinpath("profiles", kept.name)))
    return _checked(packaged, model) if packaged.is_file() else None


def embedded_profile() -> Profile:
    """The embedded model's, which is in the package."""
    (only,) = Path(str(files("crushkv").joinpath("profiles"))).glob("*.safetensors")
    return Profile.load(only)


def obtain_profile(
    model: Any, given: str | Path | None = None, tokenizer: Any = None, progress: Progress | None = None
) -> tuple[Profile | None, str]:
    """`find_profile`, else makes one and keeps it in the user's cache folder.

    Args:
        tokenizer: the model's; None: the one that was saved with it.
        progress: called with one line of text at each step of making one; None: they go to standard error.

    Returns:
        The profile and the file that it is in; or None, and why none could be made.

    Raises:
        ProfileError: see `find_profile`.
        UnsupportedModelError: see `profile_model`.
    """
    found = find_profile(model, given)
    if found is not None:
        return found, str(found.path)
    if tokenizer is None:
        try:
            tokenizer = _tokenizer(model)
        except Exception as error:  # a folder without one fails in many ways
            return None, f"no profile is there, and to make one its tokenizer is missing ({_short(error)})"
    say = progress or _to_stderr
    name = model.config._name_or_path or model.config.model_type
    tokens = len(TEXTS) * (TOKENS + AGAIN)
    say(f"crushkv: making a profile of {name}, once; it takes as long as reading {tokens} tokens")
    return keep_profile(model, profile_model(model, tokenizer, say), say)


def keep_profile(model: Any, profile: Profile, progress: Progress) -> tuple[Profile, str]:
    """Writes a profile into the user's cache folder; where that cannot be written, a warning says so."""
    path = kept_profile(model)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        profile = profile.save(path)
    except (OutputError, OSError) as error:
        warnings.warn(f"crushkv: the profile cannot be kept and will be made again ({_short(error)})", stacklevel=2)
        return profile, "made now, not kept"
    progress(f"crushkv: the profile is in {path}")
    return profile, str(path)


_found: weakref.WeakKeyDictionary[Any, dict[str | None, Profile | None]] = weakref.WeakKeyDictionary()
_obtaining = threading.RLock()


def profile_of(model: Any, given: str | None = None) -> Profile | None:
    """`obtain_profile`, asked once for each model of a process; where there is none, one warning says why.

    Raises: as `obtain_profile`.
    """
    with _obtaining:
        known = _found.setdefault(model, {})
        if given not in known:
            known[given], reason = obtain_profile(model, given)
            if known[given] is None:
                warnings.warn(
                    f"crushkv: there is no profile of this model: {reason}. The widths of key channels are chosen from "
                    "each prompt, and all heads keep the same number of tokens. "
                    "profile_model(model, tokenizer) makes a profile, which CrushConfig(profile=...) takes",
                    stacklevel=2,
                )
        return known[given]


def kept_profile(model: Any) -> Path:
    """Where the profile of a model stands in the user's cache folder, whether there is one or not."""
    return cache_folder() / "profiles" / f"{fingerprint(model, any_dtype=True)}.safetensors"


def _checked(path: Path, model: Any) -> Profile:
    profile = Profile.load(path)
    profile.check(model)
    return profile


def _tokenizer(model: Any) -> Any:
    from transformers import AutoTokenizer

    if not model.config._name_or_path:
        raise ValueError("the model was not loaded from a folder")
    return AutoTokenizer.from_pretrained(model.config._name_or_path, local_files_only=True)


def _short(error: Exception) -> str:
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= 200 else text[:197] + "..."


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
