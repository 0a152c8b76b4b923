"""Transformers' worker: its full cache and its quantized one. The latter needs optimum-quanto."""

from __future__ import annotations

from typing import Any

from transformers import QuantizedCache

from decoding import decode, full_cache, load, tensor_bytes
from worker import Method, Request, Run, arguments, serve, versions

BITS = {"quanto-4bit": 4, "quanto-2bit": 2}
METHODS = {"full": Method(None), **{name: Method(bits / 16) for name, bits in BITS.items()}}


def main() -> None:
    given = arguments()
    model = load(given.model, given.threads)

    def prepare(request: Request) -> Run:
        if request.method == "full":
            return full_cache(model, request)
        cache = QuantizedCache(backend="quanto", config=model.config, nbits=BITS[request.method])
        return lambda: decode(model, request, cache, quantized_bytes)

    serve("transformers", METHODS, versions("transformers", "torch"), given.prompt, prepare)


def quantized_bytes(cache: Any) -> int:
    """Of the quantized tensors (packed numbers, scales, zero points) and of the last tokens, which are not."""
    total = 0
    for layer in cache.layers:
        total += tensor_bytes(layer.keys, layer.values)
        for quantized in (layer._quantized_keys, layer._quantized_values):
            names, _ = quantized.__tensor_flatten__()
            total += sum(quantized_part_bytes(getattr(quantized, name)) for name in names)
    return total


def quantized_part_bytes(part: Any) -> int:
    if hasattr(part, "__tensor_flatten__"):  # packed numbers are a tensor around a tensor
        return sum(quantized_part_bytes(getattr(part, name)) for name in part.__tensor_flatten__()[0])
    return tensor_bytes(part)


if __name__ == "__main__":
    main()
