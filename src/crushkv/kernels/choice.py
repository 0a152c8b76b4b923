"""Which implementation computes attention over packed tokens."""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

from ..compiled import VARIABLE
from ..errors import ConfigError, nearest
from ..storage import TieredStorage
from . import plain

# The fastest first. The last one runs everywhere.
NAMES = ("gpu", "cpu", "plain")


class Kernels(Protocol):
    """An implementation: a module of this package."""

    def missing(self) -> str | None:
        """Why it cannot run on this machine; None: it can."""

    def runs_on(self, device: torch.device) -> bool:
        """Whether it computes on tensors of a device."""

    def build(self) -> str:
        """What it was compiled for, in a word; empty where nothing is."""

    def refusal(self, queries: Tensor, store: TieredStorage) -> str | None:
        """Why it cannot attend to what is held; None: it can."""

    def attend(self, queries: Tensor, store: TieredStorage, scaling: float, shown: Tensor | None) -> Tensor | None:
        """As `attend` below; None: it cannot."""

    def append(
        self, keys: Tensor, values: Tensor, stores: Sequence[TieredStorage], heads: Sequence[tuple[int, ...]]
    ) -> bool:
        """As below."""

    def attend_together(
        self, queries: Tensor, stores: Sequence[TieredStorage], heads: Sequence[tuple[int, ...]], scaling: float
    ) -> Tensor | None:
        """As below."""


@lru_cache
def _named(name: str) -> Kernels:
    module: Kernels = importlib.import_module(f"{__package__}.{name}")
    return module


@lru_cache
def available() -> dict[str, str | None]:
    """Every implementation, and why it cannot run here (None: it can)."""
    return {name: _named(name).missing() for name in NAMES}


def chosen(device: torch.device) -> str:
    """The implementation for tensors of a device: the one that `CRUSHKV_KERNELS` names, or the fastest.

    Raises:
        ConfigError: the variable names none, or one that cannot run on this machine or device.
    """
    return _chosen(os.environ.get(VARIABLE, ""), device.type)


def _kernels(device: torch.device) -> Kernels:
    return _named(chosen(device))


@lru_cache
def _chosen(named: str, device_type: str) -> str:
    device = torch.device(device_type)
    can = [name for name, missing in available().items() if missing is None and _named(name).runs_on(device)]
    if not named:
        return can[0]
    if named in can:
        return named
    if named in NAMES:
        why = available()[named] or f"it does not compute on the device {device_type!r}"
        raise ConfigError(f"{VARIABLE}={named!r} cannot run here: {why}. What can: {', '.join(can)}")
    raise ConfigError(f"{VARIABLE}={named!r} is unknown.{nearest(named, NAMES)} What can run here: {', '.join(can)}")


def described(device: torch.device) -> str:
    """`chosen`, and what that was compiled for: `cpu (avx2)`."""
    name = chosen(device)
    build = _named(name).build()
    return f"{name} ({build})" if build else name


def reader(store: TieredStorage) -> str:
    """What attends to the tokens of a layer: `described`, or `plain` and the reason."""
    if not store.blocks:
        return "plain (nothing is packed)"
    queries = torch.empty((store.rows, store.kv_heads, 1, store.sizes().sizes[0]), dtype=store.dtype, device="meta")
    reason = _kernels(store.device).refusal(queries, store)
    return described(store.device) if reason is None else f"plain ({reason})"


def append(keys: Tensor, values: Tensor, stores: Sequence[TieredStorage], heads: Sequence[tuple[int, ...]]) -> bool:
    """Adds one new token a row to what heads hold that hold different numbers of tokens, at once.

    Args:
        keys: `[B, Hkv, 1, D]`, of all heads. values: `[B, Hkv, 1, Dv]`.
        stores: what each group of heads holds. heads: the KV heads of each group.

    Returns:
        Whether it was done: it is not where there is no room yet, or nothing that does this. Then each is asked.
    """
    return _kernels(keys.device).append(keys, values, stores, heads)


def attend_together(
    queries: Tensor, stores: Sequence[TieredStorage], heads: Sequence[tuple[int, ...]], scaling: float
) -> Tensor | None:
    """`attend` for heads that hold different numbers of tokens, all of them at once.

    Args:
        queries: `[B, Hq, 1, D]`, of all heads.
        stores: what each group of heads holds. heads: the KV heads of each group.

    Returns:
        `[B, Hq, 1, Dv]`; None where these groups have to be asked for one by one.
    """
    return _kernels(queries.device).attend_together(queries, stores, heads, scaling)


def attend(queries: Tensor, store: TieredStorage, scaling: float, shown: Tensor | None = None) -> Tensor:
    """Attention of one new token a row over everything that `store` holds, the token itself included.

    Packed tokens are read as they are packed where the chosen implementation can, and unpacked where it cannot.

    Args:
        queries: `[B, Hq, 1, D]`, after RoPE.
        scaling: of the logits.
        shown: which slots may be seen, bool `[B, P]` or `[B, Hkv, P]`; None: all.

    Returns:
        `[B, Hq, 1, Dv]`, in the dtype of the queries.
    """
    found = _kernels(queries.device).attend(queries, store, scaling, shown)
    return plain.attend(queries, store, scaling, shown) if found is None else found
