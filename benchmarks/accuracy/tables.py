"""Prints the tables of docs/accuracy.md from the results beside this file, and draws its plots.

    python benchmarks/accuracy/tables.py [TABLE ...] [--details] [--plots docs/plots]

A table is a function that takes the results and yields blocks: a title, a head and lines. It gets a name below.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import formats
import policies
import presets
from cells import Results

TABLES = {
    "presets": presets.in_short,
    "preset-goals": presets.goals,
    "preset-models": presets.by_model,
    "preset-widths": presets.widths,
    "preset-heads": presets.heads,
    "preset-scores": presets.scores,
    "formats": formats.in_short,
    "policies": policies.in_short,
}
# What the page says in words.
DETAILS = {
    "format-fidelity": formats.fidelity,
    "policy-fidelity": policies.fidelity,
    "policy-scores": policies.scores,
}
PLOTS = {"presets.png": presets.plot, "kl-by-format.png": formats.plot}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = TABLES | DETAILS
    parser.add_argument("tables", nargs="*", metavar="TABLE", help=f"{', '.join(known)}; default: those of the page")
    parser.add_argument("--details", action="store_true", help="all tables, also those that the page leaves out")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results", help="folder of the results")
    parser.add_argument("--plots", type=Path, help="draw the plots into this folder")
    asked = parser.parse_args()
    if unknown := [name for name in asked.tables if name not in known]:
        parser.error(f"unknown table {unknown[0]!r}; known: {', '.join(known)}")
    results = Results(asked.results)
    for name in asked.tables or (known if asked.details else TABLES):
        for block in known[name](results):
            print(block)
    for name, plot in PLOTS.items() if asked.plots else ():
        plot(results).savefig(asked.plots / name)


if __name__ == "__main__":
    main()
