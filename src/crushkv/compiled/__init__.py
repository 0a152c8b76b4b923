"""What is compiled: functions on plain tensors, of which a plain form in PyTorch stands where they are used.

Nothing heavy is imported here.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import lru_cache, wraps
from importlib.metadata import version
from importlib.util import find_spec
from types import ModuleType
from typing import Concatenate, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor

from .cpu_library import library

VARIABLE = "CRUSHKV_KERNELS"
"""Environment variable that names what computes attention over packed tokens; `plain` for nothing compiled at all."""
FUSED = {"enable_fp_fusion": True}
"""Options of Triton's compiler: a product and a sum in one. Releases differ in what they do unasked."""


LEAST_TRITON = (3, 3)


class Levels(NamedTuple):
    """What the levels of a layer's key channels have in common for all tokens; see `storage.ChannelFormat`.

    Attributes:
        steps: float32 `[Hkv, 1, D]`; a channel's spread times its step is one step at a scale of 1.
        weight: float32 `[Hkv, D]`, what an error costs.
        used: float32 `[Hkv, 1, D]`, weights of the steps in a token's size.
        last: float32 `[Hkv, 1, D]`, the greatest code.
    """

    steps: Tensor
    weight: Tensor
    used: Tensor
    last: Tensor


def interpreted() -> bool:
    """Whether Triton's interpreter stands in for a GPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def triton_missing() -> str | None:
    """Why Triton cannot be used here; None: it can."""
    if not _has_triton():
        return "Triton is not installed"
    if triton_version() < LEAST_TRITON:
        return f"Triton {'.'.join(map(str, LEAST_TRITON))} or later is needed"
    if not torch.cuda.is_available() and not interpreted():
        return "there is no CUDA device"
    if torch.version.hip is not None:
        return "the kernels are made for NVIDIA's GPUs"
    return None


@lru_cache
def _has_triton() -> bool:
    return find_spec("triton") is not None  # looked for on the disk


@lru_cache
def triton_version() -> tuple[int, ...]:
    return tuple(map(int, version("triton").split(".")[:2]))


def quantizer(device: torch.device) -> ModuleType | None:
    """What quantizes on a device: `gpu_quantize` or `cpu_quantize`; None: the plain form does."""
    return _module("quantize", device)


def centring(device: torch.device) -> ModuleType | None:
    """What finds centres on a device, and takes them off: `gpu_basis` or `cpu_basis`; None: the plain form does."""
    return _module("basis", device)


def _module(subject: str, device: torch.device) -> ModuleType | None:
    if os.environ.get(VARIABLE) == "plain":
        return None
    on_cpu = device.type == "cpu"
    if (device.type == "cuda" or (on_cpu and interpreted())) and triton_missing() is None:
        return _imported(f"gpu_{subject}")
    if on_cpu and library() is not None:
        return _imported(f"cpu_{subject}")
    return None


@lru_cache
def _imported(name: str) -> ModuleType:
    return importlib.import_module(f"{__package__}.{name}")


def power_of_two(number: int, least: int = 16) -> int:
    """The least one that is no less than both: sizes of tiles and matrices on a device."""
    return max(least, 1 << (number - 1).bit_length())


@contextmanager
def where(x: Tensor) -> Iterator[None]:
    """On the GPU of a tensor: a kernel is launched on the present one, wherever its arguments lie."""
    elsewhere = x.is_cuda and x.device.index != torch.cuda.current_device()
    with torch.cuda.device(x.device) if elsewhere else nullcontext():
        yield


P = ParamSpec("P")
R = TypeVar("R")


def on_its_device(launches: Callable[Concatenate[Tensor, P], R]) -> Callable[Concatenate[Tensor, P], R]:
    """A function that launches kernels `where` its first argument is."""

    @wraps(launches)
    def run(x: Tensor, /, *args: P.args, **kwargs: P.kwargs) -> R:
        with where(x):
            return launches(x, *args, **kwargs)

    return run
