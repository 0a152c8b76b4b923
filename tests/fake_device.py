"""A device that is none: real tensors in main memory that say they are elsewhere, so that mistakes show without a GPU.

Every operation runs on the real tensors. Two mistakes are noted, with the line of crushkv that made them: tensors of
both devices in one operation, and a number that is read back, for which a GPU would be waited for. As a program, it
runs a small model with each preset and prints what was noted, as JSON. It changes PyTorch for its process: tests start
it as one of its own.
"""

from __future__ import annotations

import json
import sys
import tempfile
import warnings
from collections import Counter
from types import FrameType
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend
from transformers import AutoModelForCausalLM, LlamaConfig

from architectures import SMALL, VOCAB, write_profile
from crushkv import KVCrush
from crushkv.hf.interface import passed
from crushkv.presets import PRESETS

NAME = "elsewhere"
_setup_privateuseone_for_python_backend(NAME)
DEVICE = torch.device(NAME, 0)
aten = torch.ops.aten
COPYING = {aten.copy_.default, aten.index.Tensor, aten.index_put_.default, aten._index_put_impl_.default}
READING = {aten._local_scalar_dense.default, aten.nonzero.default, aten.equal.default, aten.masked_select.default}
mixed: Counter[str] = Counter()
waits: Counter[str] = Counter()


class Elsewhere(torch.Tensor):
    """A tensor of the device, over the real one in `held`."""

    held: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> Elsewhere:
        made: Elsewhere = torch.Tensor._make_wrapper_subclass(
            cls, held.shape, held.stride(), held.storage_offset(), dtype=held.dtype, device=DEVICE
        )
        return made

    def __init__(self, held: torch.Tensor) -> None:
        self.held = held

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})

    # These two do not come to `__torch_dispatch__`.

    def tolist(self) -> Any:
        note(waits, "tolist")
        return self.held.tolist()

    def new_tensor(self, *args: Any, **kwargs: Any) -> Any:
        note(waits, "new_tensor")
        return Elsewhere(self.held.new_tensor(*args, **kwargs))


def note(where: Counter[str], what: object) -> None:
    """Counts something at the innermost line of crushkv, where there is one."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and "/crushkv/" not in frame.f_code.co_filename:
        frame = frame.f_back
    place = "outside" if frame is None else f"{frame.f_code.co_filename.rpartition('/crushkv/')[2]}:{frame.f_lineno}"
    where[f"{place} {what}"] += 1


def run(func: Any, args: Any, kwargs: Any) -> Any:
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    ours = [x for x in tensors if isinstance(x, Elsewhere)]
    device = kwargs.get("device")
    arrives = device is not None and torch.device(device).type == NAME
    if not ours and not arrives:
        return func(*args, **kwargs)
    leaves = func is aten._to_copy.default and device is not None and not arrives
    others = any(x.ndim for x in tensors if not isinstance(x, Elsewhere))
    if ours and others and func not in COPYING:
        note(mixed, func)
    # What goes to a device is copied before the call returns, and need not have arrived.
    staged = arrives and kwargs.get("non_blocking")
    if leaves or (others and (ours or arrives) and not staged) or func in READING or _by_flags(func, args):
        note(waits, func)
    real_args, real_kwargs = tree_map(real, (args, kwargs))
    if device is not None:
        real_kwargs["device"] = torch.device("cpu")
    result = func(*real_args, **real_kwargs)
    if func._schema.is_mutable and not arrives:
        return kwargs["out"] if "out" in kwargs else args[0]
    return result if leaves else tree_map(fake, result)


def _by_flags(func: Any, args: Any) -> bool:
    """Indexing with flags: how many are set decides the shape."""
    if func not in (aten.index.Tensor, aten.index_put_.default):
        return False
    return any(index is not None and index.dtype == torch.bool for index in args[1])


def real(x: Any) -> Any:
    return x.held if isinstance(x, Elsewhere) else x


def fake(x: Any) -> Any:
    return Elsewhere(x) if isinstance(x, torch.Tensor) and not isinstance(x, Elsewhere) else x


class Watch(TorchDispatchMode):
    """Also sees what makes new tensors."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


def _patch() -> None:
    """Functions whose C++ code asks for a device that it knows."""
    make, attend = torch.tensor, F.scaled_dot_product_attention

    def tensor(data: Any, *, device: Any = None, **kwargs: Any) -> Any:
        made = make(data, **kwargs)
        if device is None or torch.device(device).type != NAME:
            return made
        if made.numel():
            note(waits, "torch.tensor")
        return Elsewhere(made)

    def attention(*args: Any, **kwargs: Any) -> Any:
        ours = any(isinstance(x, Elsewhere) for x in tree_leaves((args, kwargs)))
        args, kwargs = tree_map(real, (args, kwargs))
        result = attend(*args, **kwargs)
        return Elsewhere(result) if ours else result

    torch.tensor = tensor
    F.scaled_dot_product_attention = attention  # type: ignore[assignment]


def move(model: Any) -> None:
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = torch.nn.Parameter(Elsewhere(parameter.data), requires_grad=False)
        for name, buffer in module._buffers.items():
            module._buffers[name] = fake(buffer)


def decode(model: Any, prompt: torch.Tensor, options: dict[str, Any], interval: int) -> dict[str, dict[str, int]]:
    """What was noted while a prompt is read, while tokens are decoded, and while some of them are evicted."""
    cache = KVCrush(**options, interval=interval, min_tokens=0).cache(model)
    noted: dict[str, dict[str, int]] = {}
    tokens = prompt
    for stage, passes in (("prompt", 1), ("first", 1), ("decoding", interval - 2), ("eviction", interval)):
        mixed.clear(), waits.clear()
        for _ in range(passes):
            tokens = model(input_ids=tokens, **passed(cache), logits_to_keep=1).logits.argmax(-1)
        noted[stage] = dict(waits)
        noted["mixed"] = {**noted.get("mixed", {}), **mixed}
    assert len(cache.crushed_layers) == 3 and cache.report().bytes_fraction < 0.8
    by_need = cache.plan.config.heads == "profile"
    assert all(layer.parted == by_need for layer in cache.crushed_layers)
    return noted


def main() -> None:
    warnings.simplefilter("ignore")  # about widths from the prompt: a random model has no profile
    # Heads that belong together do not follow each other.
    several = LlamaConfig(**{**SMALL, "num_attention_heads": 8, "num_key_value_heads": 4, "hidden_size": 128})
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(several, attn_implementation="sdpa").eval()
    _patch()
    torch.manual_seed(0)
    prompt = torch.randint(1, VOCAB, (2, 300))
    ways: dict[str, dict[str, Any]] = {policy: {"policy": policy, "bits": 4} for policy in ("h2o", "pyramidkv")}
    with tempfile.TemporaryDirectory() as folder, torch.no_grad(), Watch():
        move(model)
        profile = f"{folder}/profile.safetensors"
        write_profile(model, profile)
        ways |= {name: {"config": name, "profile": profile} for name in PRESETS}
        print(json.dumps({name: decode(model, Elsewhere(prompt), way, interval=8) for name, way in ways.items()}))


if __name__ == "__main__":
    main()
