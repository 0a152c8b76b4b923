"""The model and the prompt that the benchmarks of this folder run, and the machine they run on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from crushkv.embedded import embedded_model_path
from crushkv.machine import device_name, versions
from crushkv.timing import repeated_prompt


def load(name: str | None, tokens: int) -> tuple[Any, Tensor]:
    """A model (None: the embedded one), on a GPU where there is one, and a prompt of so many tokens `[1, tokens]`.

    The prompt is the bundled document, repeated as often as it takes.
    """
    path = name or embedded_model_path()
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype="auto")
    model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    return model, repeated_prompt(AutoTokenizer.from_pretrained(path), tokens).to(model.device)


def machine() -> dict[str, Any]:
    """What a figure has to be read with."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return {"device": device_name(device), "threads": torch.get_num_threads(), **versions()}
