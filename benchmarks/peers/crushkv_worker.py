"""crushkv's worker: SnapKV and H2O with KVCrush's representatives, the presets, and the full cache beside them."""

from __future__ import annotations

from crushkv import CrushConfig, KVCrush, __version__
from crushkv.presets import PRESETS
from decoding import decode, full_cache, load
from worker import Method, Request, Run, arguments, serve, versions

METHODS = {
    "full": Method(None),
    "snapkv-kvcrush": Method(),
    "h2o-kvcrush": Method(),
    **{name: Method(preset["budget"]) for name, preset in PRESETS.items()},
}
SHARE = 0.1  # of KVCrush's representatives


def main() -> None:
    given = arguments()
    model = load(given.model, given.threads)

    def prepare(request: Request) -> Run:
        if request.method == "full":
            return full_cache(model, request)
        if request.method in PRESETS:
            config = CrushConfig(**PRESETS[request.method])
        else:
            policy = request.method.removesuffix("-kvcrush")
            config = CrushConfig(policy=policy, budget=request.budget or 1.0, representative_share=SHARE)
        cache = KVCrush(config).cache(model)
        return lambda: decode(model, request, cache, lambda cache: cache.nbytes)

    serve("crushkv", METHODS, {"crushkv": __version__, **versions("transformers", "torch")}, given.prompt, prepare)


if __name__ == "__main__":
    main()
