"""`crushkv lm-eval`: the harness's own command line, which then knows the model `crushkv`."""

from __future__ import annotations

import sys

import typer

from .sweeping import evaluation_extra


def lm_eval(context: typer.Context) -> None:
    """Run lm-evaluation-harness's own command line with the model `crushkv`.

    As in: crushkv lm-eval --model crushkv --model_args pretrained=MODEL,policy=snapkv,budget=0.25 --tasks ...
    """
    with evaluation_extra():
        from lm_eval.__main__ import cli_evaluate

        from ..evaluation import harness  # noqa: F401  (registers the model)
    before = sys.argv
    sys.argv = ["lm_eval", *context.args]
    try:
        cli_evaluate()
    finally:
        sys.argv = before
