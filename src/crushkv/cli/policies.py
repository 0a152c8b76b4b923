"""`crushkv policies`: what can be given as `--policy`."""

from __future__ import annotations

import dataclasses
import inspect
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from .options import with_options
from .output import print_json, result_console

if TYPE_CHECKING:
    from ..importance import Policy

REQUIRED = "(required)"


@with_options()
def policies(*, as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False) -> None:
    """List the importance policies and their options."""
    from ..importance import failed_policies
    from ..importance import policies as known_policies

    found = [describe(policy) for policy in known_policies().values()]
    if as_json:
        print_json({"command": "policies", "policies": found, "failed": failed_policies()})
        return
    table = Table("policy", "options", "queries", "paper")
    for policy in found:
        options = "\n".join(f"{name}={value}" for name, value in policy["options"].items())
        table.add_row(policy["name"], options, policy["queries"], policy["paper"])
    console = result_console()
    console.print(table)
    for name, reason in failed_policies().items():
        console.print(Text(f"{name}: the entry point {reason}", style="red"))


def describe(policy: type[Policy]) -> dict[str, Any]:
    """Name, paper, options with their defaults, and which queries the scores come from."""
    options = {f.name: _default(f) for f in dataclasses.fields(policy)}
    return {
        "name": policy.name,
        "paper": policy.paper,
        "summary": (inspect.getdoc(policy) or "").split("\n\n")[0],
        "options": options,
        "queries": None if REQUIRED in options.values() else _queries(policy()),
        "gives_mass": policy.gives_mass,
        "layer_budget": policy.layer_budget,
    }


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    return REQUIRED if field.default_factory is dataclasses.MISSING else field.default_factory()


def _queries(policy: Policy) -> str:
    if policy.streams:
        return "all"
    small, large = policy.queries(1), policy.queries(2)
    return "window" if small < large else f"last {small}" if small else "none"
