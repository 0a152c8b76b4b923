"""Tables on policies, pages and representatives, from results/fidelity.jsonl.gz and results/scores.jsonl.gz."""

from __future__ import annotations

from cells import SPREAD, Block, Blocks, Results, kl, longbench, retrieval, score

FILES = "*.jsonl.gz"
BUDGETS = ("0.5", "0.25", "0.125")


def name(policy: str, budget: str, page: int, share: str, more: str = "") -> str:
    return f"{policy}:budget={budget},page_size={page},representative_share={share}" + (f",{more}" if more else "")


def in_short(results: Results) -> Blocks:
    table = results.table(FILES)
    needles = ("retrieval_single_2k", "retrieval_multikey_2k")
    labels = {
        "full": "full cache",
        name("snapkv", "0.25", 16, "0"): "SnapKV, pages of 16",
        name("snapkv", "0.25", 16, "0.1"): "the same, 10 % of it KVCrush's representatives",
        name("snapkv", "0.25", 1, "0"): "SnapKV, single tokens",
        name("snapkv", "0.25", 1, "0.1"): "the same, 10 % representatives: KVCrush as published",
        name("h2o", "0.25", 1, "0"): "H2O, single tokens",
        name("h2o", "0.25", 1, "0.1"): "the same, 10 % representatives",
        name("pyramidkv", "0.25", 1, "0"): "PyramidKV, single tokens",
        name("streaming_llm", "0.25", 1, "0"): "StreamingLLM (first and last tokens)",
    }
    yield Block(
        "A quarter of the cache, in short",
        ["", *SPREAD, "same token", "LongBench score", "one needle", "one of four needles"],
        [
            [
                label,
                *table.spread_cells(n),
                table.mean(n, lambda s: s.agreement, interval=False),
                table.mean(n, longbench, interval=False),
                *(table.task(n, task, score, 2) for task in needles),
            ]
            for n, label in labels.items()
        ],
    )


def fidelity(results: Results) -> Blocks:
    table = results.table(FILES).only(kl)
    policies = ("snapkv", "expected_attention", "streaming_llm", "tova", "h2o", "pyramidkv", "random")
    budgets = [f"{float(b):.1%} of the tokens" for b in BUDGETS]
    yield Block(
        "KL of importance alone, tokens",
        ["policy", *budgets],
        [[p, *(table.mean(name(p, b, 1, "0")) for b in BUDGETS)] for p in policies],
    )
    yield Block(
        "KL of pages, importance alone",
        ["policy, page", *budgets],
        [
            [f"{p}, {page}", *(table.mean(name(p, b, page, "0")) for b in BUDGETS)]
            for p, pages in (("snapkv", (1, 8, 16, 32)), ("h2o", (1, 16)))
            for page in pages
        ],
    )
    yield Block(
        "KL of larger pages minus KL of pages of 16 (SnapKV)",
        ["page", *budgets],
        [["32", *(table.difference(name("snapkv", b, 32, "0"), name("snapkv", b, 16, "0")) for b in BUDGETS)]],
    )
    yield Block(
        "KL of pages minus KL of tokens",
        ["policy, page", *budgets],
        [
            [f"{p}, {page}", *(table.difference(name(p, b, page, "0"), name(p, b, 1, "0")) for b in BUDGETS)]
            for p, pages in (("snapkv", (8, 16, 32)), ("h2o", (16,)))
            for page in pages
        ],
    )
    yield Block(
        "KL with representatives minus KL of importance alone",
        ["policy, page, share", *budgets],
        [
            [f"{p}, {page}, {s}", *(table.difference(name(p, b, page, s), name(p, b, page, "0")) for b in BUDGETS)]
            for p, page, shares in (
                ("snapkv", 1, ("0.05", "0.1", "0.25")),
                ("h2o", 1, ("0.05", "0.1", "0.25")),
                ("pyramidkv", 1, ("0.05", "0.1", "0.25")),
                ("snapkv", 16, ("0.1", "0.25")),
            )
            for s in shares
        ],
    )
    yield Block(
        "KL of signature groups minus KL of the control, a quarter of the part given to representatives",
        ["policy, page, budget", "minus random groups", "minus groups by position"],
        [
            [
                f"{p}, {page}, {b}",
                *(
                    table.difference(name(p, b, page, "0.25"), name(p, b, page, "0.25", f"grouping={g}"))
                    for g in ("random", "position")
                ),
            ]
            for p, page, b in (
                ("snapkv", 1, "0.25"),
                ("snapkv", 1, "0.125"),
                ("snapkv", 16, "0.25"),
                ("snapkv", 16, "0.125"),
                ("h2o", 1, "0.25"),
            )
        ],
    )
    # As the recorded results name them: `anchors` is `anchor` now, and the last three left the library.
    variants = (
        "",
        "anchors=inverse_mean",
        "anchors=alternating",
        "anchors=random",
        "anchors=zeros",
        "anchors=ones",
        "signature=collapsed",
        "threshold=median",
        "representative=best",
    )
    yield Block(
        "SnapKV at a quarter, a quarter of that representatives: KL minus KL of importance alone",
        ["variant", "tokens", "pages of 16"],
        [
            [
                v or "mean anchor, a bit a query head, middle of the bucket",
                *(
                    table.difference(name("snapkv", "0.25", page, "0.25", v), name("snapkv", "0.25", page, "0"))
                    for page in (1, 16)
                ),
            ]
            for v in variants
        ],
    )
    main = [
        name("snapkv", "0.25", 16, "0"),
        name("snapkv", "0.25", 16, "0.1"),
        name("snapkv", "0.25", 1, "0"),
        name("snapkv", "0.25", 1, "0.1"),
        name("h2o", "0.25", 1, "0"),
        name("expected_attention", "0.25", 1, "0"),
        name("streaming_llm", "0.25", 1, "0"),
        name("random", "0.25", 1, "0"),
    ]
    yield Block(
        "KL by task, at a quarter",
        ["configuration", *table.tasks],
        [[n, *(table.task(n, t, kl) for t in table.tasks)] for n in main],
    )


def scores(results: Results) -> Blocks:
    table = results.table(FILES).only(score)
    names = list(table.groups)
    yield table.task_scores("Task scores at a quarter", {name: name for name in names})
    yield Block(
        "Mean scores at a quarter",
        ["configuration", "LongBench", "minus the full cache", "retrieval", "minus the full cache"],
        [
            [
                n,
                *(
                    cell
                    for read in (longbench, retrieval)
                    for cell in (
                        table.mean(n, read, interval=False),
                        "" if n == "full" else table.difference(n, "full", read),
                    )
                ),
            ]
            for n in names
        ],
    )
    pairs = {n: n.replace("representative_share=0.1", "representative_share=0") for n in names if n.endswith("=0.1")}
    pages = (name("snapkv", "0.25", 16, "0"), name("snapkv", "0.25", 1, "0"))
    yield Block(
        "Differences of mean scores",
        ["what", "LongBench", "retrieval"],
        [
            [label, *(table.difference(n, base, read) for read in (longbench, retrieval))]
            for label, n, base in (
                ("SnapKV, pages of 16 minus tokens", *pages),
                *(
                    (f"{n.split(',representative')[0]}, 10 % representatives minus none", n, b)
                    for n, b in pairs.items()
                ),
            )
        ],
    )
