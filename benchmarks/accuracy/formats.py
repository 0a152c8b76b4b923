"""Tables and a plot on bits, tiers and low rank, from results/formats."""

from __future__ import annotations

from cells import SPREAD, Block, Blocks, Results, longbench, mark_shares, retrieval
from matplotlib.figure import Figure

DISTANCES, SCORES = "formats/fidelity.jsonl.gz", "formats/scores.jsonl.gz"
BUDGETS = ("0.25", "0.125", "0.0625")
SIZES = ("4 times smaller", "8 times", "16 times")
HALF_REPRESENTATIVES = "representative_bits=2,representative_share=0.5,grouping"
CURVES = {
    "tokens, 16 bits": "page_size=1",
    "pages of 16, 16 bits": "page_size=16",
    "pages, 4 bits": "bits=4",
    "pages, 3 bits": "bits=3",
    "pages, keys 3 and values 2 bits": "bits=3/2",
    "pages, 2 bits": "bits=2",
    "half 4, half 2 bits, by score": f"bits=4,{HALF_REPRESENTATIVES}=score",
    "half 4, half 2 bits, by position": f"bits=4,{HALF_REPRESENTATIVES}=position",
    "half 4, half 2 bits, KVCrush": f"bits=4,{HALF_REPRESENTATIVES}=signature",
}
# What it is, by its names in the two sweeps.
ROWS = {
    "full cache": ("full", "full"),
    "a half, 8 bits": ("snapkv:budget=0.5,bits=8",) * 2,
    "a quarter, half 4, half 2 bits": (f"snapkv:budget=0.25,bits=4,{HALF_REPRESENTATIVES}=score",) * 2,
    "an eighth, half 4, half 2 bits": (f"snapkv:budget=0.125,bits=4,{HALF_REPRESENTATIVES}=score",) * 2,
    "a sixteenth, keys 3, values 2 bits": ("snapkv:budget=0.0625,bits=3/2",) * 2,
    "a quarter in 16 bits": ("snapkv:budget=0.25", "snapkv:budget=0.25,page_size=16"),
    "an eighth in 16 bits": ("snapkv:budget=0.125", "snapkv:budget=0.125,page_size=16"),
    "a sixteenth in 16 bits": ("snapkv:budget=0.0625", "snapkv:budget=0.0625,page_size=16"),
    "a quarter, 4 bits": ("snapkv:budget=0.25,bits=4",) * 2,
    "an eighth, keys 3, values 2 bits": ("snapkv:budget=0.125,bits=3/2",) * 2,
    "an eighth, 4 bits": ("snapkv:budget=0.125,bits=4",) * 2,
    "an eighth, half 4, half 2 bits, KVCrush": (
        "snapkv:budget=0.125,bits=4,representative_bits=2,representative_share=0.5",
        f"snapkv:budget=0.125,bits=4,{HALF_REPRESENTATIVES}=signature",
    ),
}


def name(budget: str, rest: str) -> str:
    return f"snapkv:budget={budget},{rest}"


def fidelity(results: Results) -> Blocks:
    table = results.table(DISTANCES)
    yield Block(
        "KL at equal bytes",
        ["SnapKV", *SIZES],
        [[label, *(table.mean(name(b, rest)) for b in BUDGETS)] for label, rest in CURVES.items()],
    )
    yield Block(
        "KL minus KL of 4 bits throughout, at equal bytes",
        ["SnapKV", *SIZES],
        [
            [label, *(table.difference(name(b, rest), name(b, "bits=4")) for b in BUDGETS)]
            for label, rest in CURVES.items()
            if rest != "bits=4"
        ],
    )
    kvcrush = f"bits=4,{HALF_REPRESENTATIVES}=signature"
    yield Block(
        "Half of the tokens in 2 bits: KL of those that KVCrush chooses minus KL of others, at equal bytes",
        ["minus", *SIZES],
        [
            [label, *(table.difference(name(b, kvcrush), name(b, rest)) for b in BUDGETS)]
            for label, rest in (
                ("evenly by position", f"bits=4,{HALF_REPRESENTATIVES}=position"),
                ("the next best scores", f"bits=4,{HALF_REPRESENTATIVES}=score"),
                ("none: important tokens in 4 bits", "bits=4"),
            )
        ],
    )
    yield Block(
        "What else was tried: KL",
        ["configuration", "bytes", "KL", "KL minus 4 bits at the same budget"],
        [
            [rest, table.bytes(rest), table.mean(rest), table.difference(rest, f"snapkv:budget={b},bits=4")]
            for rest, b in (
                ("snapkv:budget=0.25,bits=4,rotation=false", "0.25"),
                ("snapkv:budget=0.25,bits=3,rotation=false", "0.25"),
                ("snapkv:budget=0.25,rank=32", "0.25"),
                ("snapkv:budget=0.25,bits=4,rank=48", "0.25"),
                ("snapkv:budget=0.125,bits=4,rank=48", "0.125"),
                ("snapkv:budget=0.125,bits=3/2,page_size=1", "0.125"),
                ("snapkv:budget=0.125,bits=3/2,representative_share=0.25", "0.125"),
                ("h2o:budget=0.125,bits=3/2", "0.125"),
                ("streaming_llm:budget=0.125,bits=3/2", "0.125"),
                ("random:budget=0.125,bits=3/2", "0.125"),
            )
        ],
    )


def in_short(results: Results) -> Blocks:
    distances, scores = results.table(DISTANCES), results.table(SCORES)
    yield Block(
        "Formats, in short",
        ["", "bytes", *SPREAD, "same token", "LongBench score", "minus the full cache", "needles found"],
        [
            [
                label,
                scores.bytes(answered),
                *distances.spread_cells(followed),
                distances.mean(followed, lambda s: s.agreement, interval=False),
                scores.mean(answered, longbench, interval=False),
                "" if answered == "full" else scores.difference(answered, "full", longbench),
                scores.mean(answered, retrieval, 2, interval=False),
            ]
            for label, (answered, followed) in ROWS.items()
        ],
    )


def plot(results: Results) -> Figure:
    """Mean KL against the share of the full cache's bytes."""
    table = results.table(DISTANCES)
    figure = Figure(figsize=(8, 5), layout="constrained", dpi=150)
    axes = figure.subplots()
    for label, rest in CURVES.items():
        names = [name(budget, rest) for budget in BUDGETS]
        found = [e for n in names if (e := table.estimate(n)) is not None]
        low, high = ([e.mean - e.low for e in found], [e.high - e.mean for e in found])
        axes.errorbar(
            [table.share(n) for n in names],
            [e.mean for e in found],
            yerr=(low, high),
            marker="o",
            capsize=2,
            label=label,
            alpha=0.8,
        )
    axes.set(
        yscale="log",
        xlabel="share of the full cache's bytes (log)",
        ylabel="KL to the full cache, nats (log)",
    )
    mark_shares(axes)
    axes.legend(fontsize=8)
    return figure
