"""Options that several commands take together, each as one argument."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from .model_loader import ModelOptions


@dataclass(frozen=True)
class Group:
    """Options that a command takes together, as one argument.

    parameters: what Typer sees. build: makes the argument out of their values.
    """

    parameters: tuple[inspect.Parameter, ...]
    build: Callable[..., Any]


def with_options(**groups: Group) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorator: replaces each named parameter of a command by the options of a group, and adds `--debug`."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.name not in groups]
        shared = [p for group in groups.values() for p in group.parameters]

        @functools.wraps(command)
        def wrapper(debug: bool, **values: Any) -> None:
            built = {
                name: group.build(**{p.name: values.pop(p.name) for p in group.parameters})
                for name, group in groups.items()
            }
            command(**values, **built)

        parameters = [*own, *shared, _DEBUG]
        wrapper.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        wrapper.__annotations__ = {p.name: p.annotation for p in parameters}
        return wrapper

    return decorate


def option(name: str, kind: Any, default: Any, **info: Any) -> inspect.Parameter:
    """A keyword parameter that Typer turns into an option; its flag is its name unless `flag` says otherwise."""
    flag = info.pop("flag", "--" + name.replace("_", "-"))
    annotation = Annotated[kind, typer.Option(flag, **info)]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _set_debug(context: typer.Context, value: bool) -> None:
    if value:
        context.find_root().obj.debug = True


_DEBUG = option("debug", bool, False, callback=_set_debug, is_eager=True, help="Show tracebacks and all warnings.")


def _model(name: str, kind: Any, default: Any, metavar: str | None, help: str, **info: Any) -> inspect.Parameter:
    return option(
        name, kind, default, help=help, metavar=metavar, rich_help_panel="Model", **{"show_default": False, **info}
    )


MODEL = Group(
    (
        _model(
            "model",
            str | None,
            None,
            "MODEL",
            "Hugging Face id or folder. [dim]default: SmolLM2-135M-Instruct, embedded[/]",
        ),
        _model("dtype", str, "auto", "NAME", "auto (as saved), float32, bfloat16 or float16."),
        _model("device", str, "auto", "NAME", "auto (a GPU where there is one), cpu, cuda, cuda:1, ..."),
        _model("attn_implementation", str, "sdpa", "NAME", "sdpa, eager or flash_attention_2. [dim]default: sdpa[/]"),
        _model("prefill_chunk_size", int | None, None, "TOKENS", "Read prompts in pieces.", min=1),
        _model(
            "trust_remote_code", bool, False, None, "Run code that comes with the model.", flag="--trust-remote-code"
        ),
    ),
    ModelOptions,
)
