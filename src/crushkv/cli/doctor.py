"""`crushkv doctor`: what is installed here, and what of crushkv runs on it."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from .options import with_options
from .output import print_json, result_console, size
from .system import examine


@with_options()
def doctor(*, as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False) -> None:
    """Show what is installed here and what runs on it.

    Exit code 0 if crushkv is usable, 1 if not.
    """
    found = examine()
    if as_json:
        print_json({"command": "doctor", **found})
    else:
        _print(found)
    if not found["usable"]:
        raise typer.Exit(1)


def _print(found: dict[str, Any]) -> None:
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("versions", Text(_pairs(found["versions"])))
    table.add_row("optional", Text(_pairs(found["optional"])))
    for device in found["devices"]:
        memory = "" if device["memory_bytes"] is None else f", {size(device['memory_bytes'])}"
        table.add_row("device", Text(f"{device['device']}: {device['description']}{memory}"))
    memory = found["memory"]
    table.add_row("memory", f"{size(memory['available_bytes'])} free of {size(memory['total_bytes'])}")
    embedded = found["embedded_model"]
    table.add_row("embedded model", Text(embedded["folder"] if embedded["ready"] else embedded["advice"]))
    table.add_row("attention", Text(_yes_no(found["attention_implementations"])))
    table.add_row("features", Text(_yes_no(found["features"])))
    for problem in found["problems"]:
        table.add_row("problem", Text(problem, style="red"))
    console = result_console()
    console.print(table)
    console.print("crushkv is usable here." if found["usable"] else "crushkv is not usable here.", style="bold")


def _pairs(versions: dict[str, str | None]) -> str:
    return ", ".join(f"{name} {version or 'not installed'}" for name, version in versions.items())


def _yes_no(flags: dict[str, bool]) -> str:
    return ", ".join(f"{name} {'yes' if flag else 'no'}" for name, flag in flags.items())
