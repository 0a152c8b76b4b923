"""Loads a model and its tokenizer: safetensors only, and no code of the model's own unless that was asked for."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, CrushError, nearest, one_line
from ..machine import memory, versions
from .options import ModelOptions
from .output import say

if TYPE_CHECKING:
    from ..timing.measure import Measurement

DTYPES = ("auto", "float32", "bfloat16", "float16")
EMBEDDED = "SmolLM2-135M-Instruct (embedded)"


class ModelError(CrushError):
    """The model that was named cannot be loaded."""


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to generate, its tokenizer, and the name it goes by."""

    name: str
    model: Any
    tokenizer: Any

    def describe(self) -> dict[str, Any]:
        config = self.model.config
        return {
            "name": self.name,
            "type": config.model_type,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "device": str(self.model.device),
            "attn_implementation": config.get_text_config(decoder=True)._attn_implementation,
        }

    def conditions(self, *packages: str) -> dict[str, Any]:
        """The model and the versions of the packages: a result has to be read with both."""
        return {"model": self.describe(), "versions": versions(*packages)}

    def figures(self, run: Measurement) -> dict[str, Any]:
        """The figures of one run, and its answer as text."""
        from ..timing.figures import figures

        return {"answer": self.tokenizer.decode(run.token_ids, skip_special_tokens=True), **figures(run)}

    def check_room(self, prompt_tokens: int, new_tokens: int = 0) -> None:
        """Refuses a prompt or an answer that the model has no positions for.

        It warns if the model was made for fewer tokens.
        """
        from ..hf.support import check_prompt, position_limit, warn_beyond_training

        config = self.model.config
        check_prompt(prompt_tokens, config)
        limit = position_limit(config)
        if limit is not None and prompt_tokens + new_tokens > limit:
            raise ConfigError(
                f"--max-new-tokens {new_tokens}: the prompt of {prompt_tokens} tokens leaves {limit - prompt_tokens} "
                f"of the model's {limit} positions"
            )
        warn_beyond_training(prompt_tokens + new_tokens, config)


def load(options: ModelOptions) -> LoadedModel:
    """Loads the model that the options name, and says so if it takes long.

    Raises:
        ConfigError: an option has a value that is not accepted here.
        ModelError: the model cannot be found, read or run.
        EmbeddedModelError: the embedded model cannot be prepared.
    """
    import torch

    if options.dtype not in DTYPES:
        raise ConfigError(f"--dtype {options.dtype!r}: unknown.{nearest(options.dtype, DTYPES)}")
    device = _device(options.device)
    _check_attention(options.attn_implementation)
    source, name = _find(options.model)
    say(f"Loading {name}")
    trust = {"trust_remote_code": options.trust_remote_code}
    tokenizer = _pretrained("AutoTokenizer", name, source, **trust)
    model, info = _pretrained(
        "AutoModelForCausalLM",
        name,
        source,
        dtype=options.dtype if options.dtype == "auto" else getattr(torch, options.dtype),
        attn_implementation=options.attn_implementation,
        use_safetensors=True,
        output_loading_info=True,
        **trust,
    )
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise ModelError(
            f"--model {name!r}: {len(missing)} weights are not in its files (the first: {missing[0]}), which would "
            "leave random numbers in their place"
        )
    try:
        return LoadedModel(name, model.to(device).eval(), tokenizer)
    except (RuntimeError, AssertionError) as error:
        raise ModelError(f"--device {options.device!r}: {one_line(str(error), limit=300)}") from error


def load_config(model: str | None) -> tuple[str, Any]:
    """The name of a model (None: the embedded one) and its configuration, without its weights. Errors as of `load`."""
    source, name = _find(model)
    return name, _pretrained("AutoConfig", name, source)


def load_local(model: str | None) -> Any:
    """The model alone, on the CPU, from weights that are on this machine: nothing is downloaded.

    Raises:
        ModelError: its weights are not here, do not fit into the free memory, or cannot be read.
        EmbeddedModelError: the embedded model cannot be prepared.
    """
    source, name = _find(model)
    size = sum(file.stat().st_size for file in _local_folder(source).glob("*.safetensors"))
    if not size:
        raise ModelError(f"{name!r} has no weights in safetensors format on this machine")
    _, free = memory()
    if free is not None and size > free:
        raise ModelError(f"the {size / 2**30:.1f} GiB of weights of {name!r} do not fit into the free memory")
    say(f"Loading {name}")
    local = {"use_safetensors": True, "local_files_only": True}
    return _pretrained("AutoModelForCausalLM", name, source, dtype="auto", **local).eval()


def _local_folder(source: str) -> Path:
    """Where the files of a model are: its folder, or the snapshot in the local Hugging Face cache."""
    from huggingface_hub import try_to_load_from_cache

    if Path(source).is_dir():
        return Path(source)
    config = try_to_load_from_cache(source, "config.json")
    if not isinstance(config, str):
        raise ModelError(f"{source!r} has no files on this machine")
    return Path(config).parent


def _find(model: str | None) -> tuple[str, str]:
    """Where to load from, and the name to show."""
    if model is None:
        from ..embedded import embedded_model_path

        return str(embedded_model_path(progress=say)), EMBEDDED
    folder = Path(model).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ModelError(f"--model {model!r}: the folder has no config.json, so it is no Hugging Face model")
        return str(folder), model
    if folder.exists() or model.startswith((".", "/", "~")) or model.count("/") > 1 or not model.strip():
        raise ModelError(f"--model {model!r}: there is no such folder, and it is no Hugging Face id (owner/name)")
    return model, model


def _pretrained(kind: str, name: str, source: str, **options: Any) -> Any:
    """What one of Transformers' Auto classes reads. Transformers itself reports nothing, and converts nothing.

    Raises:
        ModelError: it cannot be read. A broken folder fails in as many ways as it has files.
    """
    import transformers
    from huggingface_hub.utils import logging as hub_logging
    from huggingface_hub.utils.tqdm import enable_progress_bars

    # Otherwise Transformers would ask a service on the Hub to convert checkpoints that are pickles.
    os.environ["DISABLE_SAFETENSORS_CONVERSION"] = "1"
    # Errors are told here, in one line; downloads keep their progress bars.
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    enable_progress_bars()
    hub_logging.set_verbosity_error()
    try:
        return getattr(transformers, kind).from_pretrained(source, **options)
    except Exception as error:
        raise ModelError(f"--model {name!r}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    text = str(error)
    if "couldn't connect" in text or "offline" in text.lower():
        return (
            "there is no folder of that name, it is not in the local Hugging Face cache, and the Hub cannot be reached"
        )
    if "trust_remote_code" in text:
        return "it needs code of its own, which runs only with --trust-remote-code"
    if "use_safetensors" in text or "model.safetensors" in text:
        return "it has no weights in safetensors format, and other formats (pickles) are not loaded"
    kind = "" if isinstance(error, (OSError, ValueError)) else f"{type(error).__name__}: "
    return one_line(kind + text, limit=300)


def _device(name: str) -> Any:
    import torch

    if name == "auto":
        mps = torch.backends.mps.is_available()
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if mps else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"--device {name!r}: accepted are auto, cpu, cuda, cuda:1, mps") from None
    present = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if device.type in present and (device.index or 0) >= present[device.type]:
        here = ", ".join(kind for kind, count in present.items() if count)
        raise ConfigError(f"--device {name!r}: there is none here; present: {here}")
    return device


def _check_attention(name: str) -> None:
    present = attention_implementations()
    if name not in present:
        raise ConfigError(f"--attn-implementation {name!r}: unknown.{nearest(name, present)}")
    # Transformers would download a kernel from the Hub instead.
    if not present[name]:
        raise ConfigError(f"--attn-implementation {name!r}: its package (flash-attn) or a GPU for it is missing here")


def attention_implementations() -> dict[str, bool]:
    """The implementations that crushkv works with, and whether each can be used here."""
    from transformers import utils

    from ..hf.attention import SUPPORTED

    def present(name: str) -> bool:
        if not name.startswith("flash_attention_"):
            return True
        check = getattr(utils, f"is_flash_attn_{name[-1]}_available", None)  # absent where Transformers is older
        return check is not None and bool(check())

    return {name: present(name) for name in SUPPORTED}
