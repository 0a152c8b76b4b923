"""This machine: versions of packages, missing extras, processor, memory, and how freed memory goes back to it."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import re
import sys
from pathlib import Path
from typing import Any

from ._version import __version__


def installed(distribution: str) -> str | None:
    """The version of an installed package, or None."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def missing(extra: str) -> list[str]:
    """The packages of one of crushkv's extras (`embedded`, `eval`, `vllm`) that are not installed."""
    from importlib.metadata import PackageNotFoundError, requires

    try:
        needed = requires("crushkv") or []
    except PackageNotFoundError:  # crushkv itself runs from a folder of source
        return []
    names = [re.match(r"[\w.-]+", line) for line in needed if re.search(rf"""extra == ['"]{extra}['"]""", line)]
    return [name[0] for name in names if name is not None and installed(name[0]) is None]


def versions(*others: str) -> dict[str, str | None]:
    """The versions of everything that a result depends on."""
    packages = {name: installed(name) for name in ("torch", "transformers", "tokenizers", *others)}
    return {"crushkv": __version__, "python": platform.python_version(), **packages}


def cpu() -> tuple[str, int | None]:
    """The CPU's name, and the number of cores that this process may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found[1] if found else platform.machine(), cores


def device_name(device: Any) -> str:
    """The GPU's name, or that of the CPU with its cores."""
    import torch

    name, cores = cpu()
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{name}, {cores} cores"


def memory() -> tuple[int | None, int | None]:
    """Bytes of this machine, and how many of them are available, as Linux tells; None elsewhere."""
    try:
        text = Path("/proc/meminfo").read_text()
    except OSError:
        text = ""
    found = [re.search(rf"{name}:\s*(\d+) kB", text) for name in ("MemTotal", "MemAvailable")]
    total, free = (int(match[1]) * 1024 if match else None for match in found)
    return total, free


def resident_memory() -> int | None:
    """Bytes of main memory that this process occupies, as Linux tells; None elsewhere."""
    try:
        with open("/proc/self/statm", "rb", buffering=0) as file:  # asked for each layer of a prompt
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return None


def return_freed_memory() -> None:
    """Gives the pages that the C library's allocator keeps in reserve back to the operating system, where it can.

    Takes 5 to 30 ms while a model of a few hundred megabytes works.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # musl has no such function
            ctypes.CDLL(None).malloc_trim(0)
