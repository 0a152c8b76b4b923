"""The application: its commands, and how it ends (`error: ...` on one line, and an exit code)."""

from __future__ import annotations

import contextlib
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Annotated, Any, NoReturn

import typer

from .._version import __version__
from ..errors import ConfigError, CrushError, one_line
from .bench import bench
from .doctor import doctor
from .documents import ask, build
from .evaluate import evaluate, fidelity, lm_eval, report, sweep
from .generate import generate
from .plan import plan
from .run import run
from .show import inspect, policies, profile

# Typer brings its own copy of Click or uses the package, depending on its release; the base class of what they
# raise for a wrong command line is reached through a public name.
_CommandLineError: Any = typer.BadParameter.__mro__[2]
INTERRUPTED = 130  # 128 + SIGINT, as shells have it

app = typer.Typer(
    name="crushkv",
    help="Makes the KV cache of a language model several times smaller (KVCrush, arXiv 2503.00022).",
    add_completion=False,
    rich_markup_mode="rich",
)


def _show_version(asked: bool) -> None:
    if asked:
        print(f"crushkv {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


for _command in (run, generate, build, ask, plan, profile, inspect, fidelity, sweep, report, bench, policies, doctor):
    app.command()(_command)
app.command("eval")(evaluate)
# Its options are the harness's.
_FOREIGN = {"allow_extra_args": True, "ignore_unknown_options": True}
app.command("lm-eval", add_help_option=False, context_settings=_FOREIGN)(lm_eval)


def main(args: Sequence[str] | None = None) -> NoReturn:
    """Runs the command line. Exit code 0; 2 for what was asked in a wrong way; 1 for all else; 130 for Ctrl-C."""
    sys.exit(_run(args))


def _run(args: Sequence[str] | None) -> int:
    state = SimpleNamespace(debug=False)  # set by --debug, which is an option of each command
    try:
        with _plain_warnings(state):
            command = typer.main.get_command(app)
            code = command.main(args, prog_name="crushkv", standalone_mode=False, obj=state)
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

    def show(message: Any, category: Any, filename: str, lineno: int, file: Any = None, line: Any = None) -> None:
        text = str(message)
        if text.startswith("crushkv: "):
            print(f"warning: {text.removeprefix('crushkv: ')}", file=sys.stderr)
        elif state.debug:
            sys.stderr.write(warnings.formatwarning(message, category, filename, lineno, line))

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield
