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
    for entry in entry_points(group=ENTRY_POINTS):
        try:
            policy = entry.load()
        except Exception as error:
            raise ConfigError(
                f"the policy {entry.name!r} of entry point {entry.value!r} does not load: {error}"
            ) from error
        register(policy)


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
        raise ConfigError(f"policy={name!r}: unknown.{nearest(str(name), known)}")
    fields = {f.name for f in dataclasses.fields(known[name])}
    for option in options or {}:
        if option not in fields:
            hint = nearest(option, fields) if fields else " It has no options."
            raise ConfigError(f"policy_options: {name!r} has no option {option!r}.{hint}")
    return known[name](**(options or {}))
