"""kvpress's worker. The question is compressed with the context, as in `with press(model): model.generate(...)`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kvpress import AdaKVPress, ExpectedAttentionPress, ObservedAttentionPress, SnapKVPress
from transformers import DynamicCache

from decoding import decode, dense_bytes, full_cache, load
from worker import Method, Outcome, Request, Run, arguments, serve, versions

PRESSES: dict[str, Callable[[float], Any]] = {
    "snapkv": lambda ratio: SnapKVPress(compression_ratio=ratio),
    "expected-attention": lambda ratio: ExpectedAttentionPress(compression_ratio=ratio),
    "observed-attention": lambda ratio: ObservedAttentionPress(compression_ratio=ratio),
    "adakv-snapkv": lambda ratio: AdaKVPress(SnapKVPress(compression_ratio=ratio)),
}
METHODS = {
    "full": Method(None),
    **{name: Method() for name in PRESSES},
    "observed-attention": Method(note="Needs eager attention; its ratio is to the full cache with sdpa."),
    "adakv-snapkv": Method(note="Frees nothing: evicted entries stay in memory, and each step masks them."),
}


def main() -> None:
    given = arguments()
    model = load(given.model, given.threads)

    def prepare(request: Request) -> Run:
        model.set_attn_implementation("eager" if request.method == "observed-attention" else "sdpa")
        if request.method == "full":
            return full_cache(model, request)
        cache = DynamicCache(config=model.config)
        press = PRESSES[request.method](1 - float(request.budget or 1))

        def run() -> Outcome:
            # The cache counts what is left in it; `generate` counts all tokens, and so does this loop.
            with press(model):
                return decode(model, request, cache, dense_bytes, positions=True)

        return run

    serve("kvpress", METHODS, versions("kvpress", "transformers", "torch"), given.prompt, prepare)


if __name__ == "__main__":
    main()
