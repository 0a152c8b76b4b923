"""The library for CPUs, in C++.

It is built when crushkv is installed, where there is a C++ compiler, once for each set of instructions. It knows
nothing of Python or PyTorch: it gets pointers and numbers, and runs on PyTorch's own threads.
"""

from __future__ import annotations

import ctypes
import sysconfig
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

BUILDS = ("avx512", "avx2", "portable")
"""Sets of instructions, the best first."""
# As in cpu.h.
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
FILLED, INTERVAL, TOGETHER = 16, 32, 64


@lru_cache
def load(build: str) -> ctypes.CDLL | None:
    """The library that was built for some instructions; None: it is not there, or does not run on this processor."""
    path = Path(__file__).with_name(f"_cpu_{build}{sysconfig.get_config_var('EXT_SUFFIX')}")
    try:
        found = ctypes.CDLL(str(path))
    except OSError:
        return None
    if not found.runs():
        return None
    found.use_parallel(_openmp())
    return found


def build() -> str | None:
    """The best one that is there and runs here."""
    return next((build for build in BUILDS if load(build) is not None), None)


def library() -> ctypes.CDLL | None:
    """The library of that build."""
    return None if (name := build()) is None else load(name)


def call(name: str, *given: Tensor | int | float | None) -> None:
    """Calls a function of the library that takes addresses of tensors (None: null), integers of 64 bits and floats, and
    at the end how many threads it may use."""
    compiled = library()
    assert compiled is not None
    function = getattr(compiled, name)
    if function.argtypes is None:  # from the second call on, nothing is made of each argument
        function.argtypes = [*map(_type_of, given), ctypes.c_int64]
    function(*(x.data_ptr() if isinstance(x, Tensor) else x for x in given), torch.get_num_threads())


def _type_of(x: Tensor | int | float | None) -> type[ctypes.c_void_p] | type[ctypes.c_int64] | type[ctypes.c_float]:
    if isinstance(x, int):
        return ctypes.c_int64
    return ctypes.c_float if isinstance(x, float) else ctypes.c_void_p


@lru_cache
def _openmp() -> ctypes.c_void_p | None:
    """The entry of the OpenMP library that PyTorch runs on, so that both share their threads."""
    bundled = sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"))
    bundled += sorted(Path(torch.__file__).parents[1].glob("torch.libs/libgomp*.so*"))
    for name in (None, *bundled):  # first what is loaded for all
        try:
            return ctypes.cast(ctypes.CDLL(None if name is None else str(name)).GOMP_parallel, ctypes.c_void_p)
        except (OSError, AttributeError):
            continue
    return None
