"""Profiles of models: how one is made, and where it is found and kept."""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import CrushConfig
from ..errors import UnsupportedModelError
from ..files import OutputError, cache_folder
from ..fingerprint import fingerprint
from ..profile import Profile, ProfileError
from ..rope import Rope
from .cache import CrushCache
from .layer import AttentionCall, CrushLayer
from .rope import find_ropes
from .support import input_device, position_limit

TEXTS = ("essay", "code", "news", "dialogue")
TOKENS = 1200  # of each text
LEAST_TOKENS = 128  # fewer tell nothing
SINK = 4  # the first tokens, whose keys are unlike all others
UNSETTLED = 64  # queries that see few tokens
FILE = "crushkv-profile.safetensors"  # beside a model's own files

Progress = Callable[[str], None]


def profile_model(model: Any, tokenizer: Any, progress: Progress | None = None) -> Profile:
    """Reads four texts that come with the package, and measures the energies of keys and queries.

    Args:
        model: a Transformers model; nothing on it is changed.
        tokenizer: the model's own.
        progress: called with one line of text at each step.

    Raises:
        UnsupportedModelError: the model's cache cannot be compressed, or its layers' heads differ in size.
    """
    say = progress or (lambda line: None)
    limit = position_limit(model.config) or TOKENS
    if limit < LEAST_TOKENS:
        raise UnsupportedModelError(f"a profile needs {LEAST_TOKENS} tokens of text, the model has {limit} positions")
    ropes = find_ropes(model, min(limit, TOKENS))
    keys: list[Tensor] = []
    queries: list[Tensor] = []
    begin = time.monotonic()
    for done, name in enumerate(TEXTS):
        left = (time.monotonic() - begin) / done * (len(TEXTS) - done) if done else 0
        say(f"[{done + 1}/{len(TEXTS)}] reading the {name}" + (f", about {left:.0f} s left" if done else ""))
        text = files("crushkv").joinpath("texts", f"{name}.txt").read_text(encoding="utf-8")
        ids = torch.as_tensor(tokenizer(text)["input_ids"])[: min(limit, TOKENS)]
        of_keys, of_queries = _energies(model, ids, ropes)
        keys.append(of_keys)
        queries.append(of_queries)
    return Profile(
        keys=torch.stack(keys).mean(0),
        queries=torch.stack(queries).mean(0),
        model=fingerprint(model, any_dtype=True),
        model_type=str(model.config.model_type),
        texts=TEXTS,
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
    say(f"crushkv: making a profile of {name}, once; it takes as long as reading {len(TEXTS) * TOKENS} tokens")
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


# Reading


@torch.no_grad()
def _energies(model: Any, ids: Tensor, ropes: list[Rope | None]) -> tuple[Tensor, Tensor]:
    """Of keys and queries, `[L, Hkv, D]` each, while the model reads `ids [S]`."""
    cache = _MeasuringCache(model, CrushConfig(budget=1.0, policy="streaming_llm", interval=0))
    layers = [layer for layer in cache.layers if isinstance(layer, _MeasuringLayer)]
    for layer, rope in zip(layers, ropes, strict=True):
        layer.rope = rope
    # Logits are of no use here. `forward`: the hook of a block of KVCrush would put its own cache there.
    model.base_model.forward(input_ids=ids[None].to(input_device(model)), past_key_values=cache, use_cache=True)
    energies = [layer.energies for layer in layers]
    shapes = {tuple(of_keys.shape) for of_keys, _ in energies}
    if len(shapes) > 1:
        raise UnsupportedModelError(f"{model.config.model_type}: heads differ between layers ({sorted(shapes)})")
    return torch.stack([of_keys for of_keys, _ in energies]), torch.stack([of_queries for _, of_queries in energies])


class _MeasuringLayer(CrushLayer):
    """Never evicts, and keeps the energies of one pass."""

    rope: Rope | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        self._received = key_states
        return super().update(key_states, value_states, *args, **kwargs)

    def after_attention(self, call: AttentionCall) -> None:
        keys, queries = self._received[0].float(), call.queries[0].float()
        del self._received
        positions = torch.arange(keys.shape[1], device=keys.device)
        if self.rope is not None:
            keys = self.rope.unturned(keys, positions)
        keys = keys[:, SINK:]
        of_keys = (keys - keys.mean(1, keepdim=True)).pow(2).mean(1)
        # The heads of a group follow each other.
        of_queries = queries[:, UNSETTLED:].unflatten(0, (keys.shape[0], -1)).pow(2).mean((1, 2))
        if self.rope is not None:
            of_keys, of_queries = self.rope.averaged(of_keys), self.rope.averaged(of_queries)
        self.energies = of_keys.cpu(), of_queries.cpu()


class _MeasuringCache(CrushCache):
    layer_class = _MeasuringLayer
