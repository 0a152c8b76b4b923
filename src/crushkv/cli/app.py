"""The application: its commands, and how it ends (`error: ...` on one line, and an exit code)."""

from __future__ import annotations

import contextlib
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from importlib import import_module
from types import SimpleNamespace
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperCommand

from .._version import __version__
from ..errors import ConfigError, CrushError, one_line

# Typer brings its own copy of Click or uses the package, depending on its release; the base class of what they
# raise for a wrong command line is reached through a public name.
_CommandLineError: Any = typer.BadParameter.__mro__[2]
INTERRUPTED = 130  # 128 + SIGINT, as shells have it

# The commands in the order of the help, each with its module and its function.
COMMANDS = {
    "run": "run.run",
    "generate": "generate.generate",
    "build": "documents.build",
    "ask": "documents.ask",
    "plan": "show.plan",
    "profile": "show.profile",
    "inspect": "show.inspect",
    "fidelity": "evaluate.fidelity",
    "sweep": "evaluate.sweep",
    "report": "evaluate.report",
    "bench": "bench.bench",
    "policies": "show.policies",
    "doctor": "doctor.doctor",
    "eval": "evaluate.evaluate",
    "lm-eval": "evaluate.lm_eval",
}
# The harness reads the options of `lm-eval` itself.
_FOREIGN: dict[str, Any] = {
    "add_help_option": False,
    "context_settings": {"allow_extra_args": True, "ignore_unknown_options": True},
}


class _Command(TyperCommand):
    """Its help is plain text with a section for each group of options: what draws boxes takes 0.1 s to import."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        sections: dict[str, list[tuple[str, str]]] = {"Arguments": [], "Options": []}
        for param in self.get_params(ctx):
            if (record := param.get_help_record(ctx)) is not None:
                usual = "Arguments" if param.param_type_name == "argument" else "Options"
                name = typer.style(record[0], fg="cyan")  # taken out where the output is no terminal
                sections.setdefault(getattr(param, "rich_help_panel", None) or usual, []).append((name, record[1]))
        for title, records in sections.items():
            if records:
                with formatter.section(typer.style(title, bold=True)):
                    formatter.write_dl(records)


def _application(args: Sequence[str]) -> typer.Typer:
    """The application, with as little of it as can answer `args`: making options and reading modules takes time."""
    first = next((arg for arg in args if arg != "--"), "--help")
    app = typer.Typer(
        help="Makes the KV cache of a language model several times smaller (KVCrush, arXiv 2503.00022).",
        add_completion=False,
        add_help_option=first == "--help",
        rich_markup_mode=None,
    )
    app.callback(invoke_without_command=True)(_root)
    if first in COMMANDS:
        app.command(first, cls=_Command, **(_FOREIGN if first == "lm-eval" else {}))(_function(first))
    else:
        for name in COMMANDS:  # to be listed, or to be the nearest to a misspelled one
            told = (_function(name).__doc__ or "").partition("\n\n")[0] if first == "--help" else None
            app.command(name, short_help=told)(lambda: None)
    return app


def _function(name: str) -> Any:
    module, function = COMMANDS[name].split(".")
    return getattr(import_module(f".{module}", __package__), function)


def _show_version(asked: bool) -> None:
    if asked:
        print(f"crushkv {__version__}")
        raise typer.Exit


def _root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def main(args: Sequence[str] | None = None) -> NoReturn:
    """Runs the command line. Exit code 0; 2 for a wrong option or value; 130 for Ctrl-C; 1 for any other error."""
    sys.exit(_run(args))


def _run(args: Sequence[str] | None) -> int:
    state = SimpleNamespace(debug=False)  # set by --debug, which is an option of each command
    try:
        with _plain_warnings(state):
            args = sys.argv[1:] if args is None else args
            command = typer.main.get_command(_application(args))
            code = command.main(list(args), prog_name="crushkv", standalone_mode=False, obj=state)
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except Exception as error:
        if state.debug:
            traceback.print_exc()
        message, code = _explain(error)
        print(f"error: {message}", file=sys.stderr)
    if code == INTERRUPTED:
        print("interrupted", file=sys.stderr)
    return int(code or 0)


def _explain(error: Exception) -> tuple[str, int]:
    """What to say about an error, and the exit code."""
    if isinstance(error, _CommandLineError):
        return one_line(error.format_message()), error.exit_code
    if isinstance(error, CrushError):
        return one_line(str(error)), 2 if isinstance(error, ConfigError) else 1
    what = one_line(f"{type(error).__name__}: {error}", limit=400)
    return f"{what} (--debug shows where)", 1


@contextlib.contextmanager
def _plain_warnings(state: SimpleNamespace) -> Iterator[None]:
    """crushkv's own warnings as one line each; those of other packages only with --debug."""

    def show(*warning: Any, **rest: Any) -> None:
        text = str(warning[0])
        if text.startswith("crushkv: "):
            print(f"warning: {text.removeprefix('crushkv: ')}", file=sys.stderr)
        elif state.debug:
            sys.stderr.write(warnings.formatwarning(*warning[:4]))

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield
