"""Policies by name: the built-in ones, and those of other packages (entry point group `crushkv.policies`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import cache
from importlib.metadata import entry_points
from typing import Any, TypeVar

from ..errors import ConfigError, nearest
from .base import Policy

ENTRY_POINTS = "crushkv.policies"
_registered: dict[str, type[Policy]] = {}
_failed: dict[str, str] = {}
P = TypeVar("P", bound=type[Policy])


def register(policy: P) -> P:
    """Class decorator: makes a policy known under its `name`.

    Raises:
        ConfigError: another policy has that name.
    """
    if _registered.setdefault(policy.name, policy) is not policy:
        raise ConfigError(f"policy {policy.name!r} is registered twice: {_registered[policy.name]} and {policy}")
    return policy


@cache
def _load_entry_points() -> None:
    """Loads the policies of other packages, and notes the names of those that fail."""
    for entry in entry_points(group=ENTRY_POINTS):
        try:
            policy = entry.load()
            if not (isinstance(policy, type) and issubclass(policy, Policy)):
                raise ConfigError(f"{policy!r} is no subclass of crushkv.importance.Policy")
            register(policy)
        except Exception as error:
            _failed[entry.name] = f"{entry.value!r} does not load: {type(error).__name__}: {error}"


def failed_policies() -> dict[str, str]:
    """Why a policy of another package cannot be used, by its name."""
    _load_entry_points()
    return dict(sorted(_failed.items()))


def check_loads(name: str) -> None:
    """Raises `ConfigError` where a policy of that name is installed and does not load."""
    if name in failed_policies():
        raise ConfigError(f"policy={name!r}: the entry point {_failed[name]}")


def policies() -> dict[str, type[Policy]]:
    """Every known policy by name."""
    _load_entry_points()
    return dict(sorted(_registered.items()))


def make_policy(name: str, options: Mapping[str, Any] | None = None) -> Policy:
    """A policy by name with its options.

    Raises:
        ConfigError: the name, an option or an option's value is not accepted.
    """
    known = policies()
    if name not in known:
        check_loads(name)
        raise ConfigError(f"policy={name!r}: unknown.{nearest(str(name), known)}")
    fields = {f.name for f in dataclasses.fields(known[name])}
    for option in options or {}:
        if option not in fields:
            hint = nearest(option, fields) if fields else " It has no options."
            raise ConfigError(f"policy_options: {name!r} has no option {option!r}.{hint}")
    return known[name](**(options or {}))
