"""`crushkv report`: a page and plots of results."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..files import write_text
from .options import with_options
from .output import check_folder, say
from .sweeping import evaluation_extra


@with_options()
def report(
    results: Annotated[
        list[Path], typer.Argument(help="Files of `crushkv sweep` or `fidelity -o`.", metavar="RESULTS...")
    ],
    *,
    output: Annotated[Path, typer.Option("--output", "-o", help="The page.", metavar="FILE")] = Path("report.html"),
    plots: Annotated[
        Path | None, typer.Option(help="Write the plots as PNG and SVG into this folder, too.", metavar="DIR")
    ] = None,
) -> None:
    """Make a self-contained page of results: tables, plots, paired differences with intervals."""
    check_folder(output)
    with evaluation_extra():
        from ..evaluation import read_report_samples
        from ..evaluation.plots import figures, save
        from ..evaluation.report import render
        from ..evaluation.tables import rows
    samples = read_report_samples(results)
    table = rows(samples)
    write_text(output, render(samples, table=table))
    say(f"{output}: {len(samples)} samples")
    if plots is not None:
        drawn = figures(table)
        save(drawn, plots)
        say(f"{plots}: {', '.join(drawn)} as PNG and SVG")
