"""Keys with a scale for each token, or with a range for each channel of a page, at equal bytes: KL to the full cache.

    python benchmarks/research/key_ranges.py --data-dir DIR [--model FOLDER --chat] [--prompts 3] [-o results.jsonl]

Every token is kept, and only keys are rounded; sink and window are left alone. All forms take off the mean before RoPE
and give the channels widths by the profile. A scale a token is the library's own format: one byte for each token and
head, and the spread of each channel, which is fitted to the tokens that are attended to. A range a channel and page
is two bytes for each channel of so many tokens; the levels lie evenly between its ends, and a channel without bits is
held as the middle of its range.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from scores import chosen
from torch import Tensor

from crushkv import CrushConfig
from crushkv.cli.models import load
from crushkv.cli.options import ModelOptions
from crushkv.core import Evictor
from crushkv.evaluation.fidelity import Reference
from crushkv.evaluation.recording import Recording
from crushkv.evaluation.runner import _chat
from crushkv.evaluation.statistics import macro_mean
from crushkv.evaluation.tasks import TaskSource, load_tasks
from crushkv.hf import CrushCache
from crushkv.importance import LayerView
from crushkv.rope import Rope
from crushkv.storage import KeyEnergy
from crushkv.storage.basis import fit_channels
from crushkv.storage.channels import ChannelFormat, fitted_spread, quantize
from crushkv.storage.widths import allocate

TASKS = ("trec_short_1k", "samsum_short_1k", "multi_news", "qasper", "lcc", "retrieval_multikey_2k")
SINK, WINDOW = 4, 32
BITS = (3.5, 2.5)  # a number, ranges or scales included
PAGES = (32, 64, 128)
FITTED, BY_SQUARES = "a scale a token", "the same, spreads by mean square"


def by_token(x: Tensor, spread: Tensor, form: ChannelFormat) -> Tensor:
    return quantize(x, spread, form).numbers(spread, form)


def by_page(x: Tensor, spread: Tensor, widths: Tensor, page: int) -> Tensor:
    """`x [1, Hkv, P, D]` rounded, the ends of each range to a byte: sixteenths of the channel's root mean square."""
    step, last = spread.float() / 16, (2.0**widths - 1)[None, :, None]
    found = []
    for piece in x.split(page, dim=2):
        low = (piece.amin(2, keepdim=True) / step).floor().clamp(-128, 127) * step
        high = (piece.amax(2, keepdim=True) / step).ceil().clamp(-128, 127) * step
        unit = ((high - low) / last.clamp(min=1)).clamp(min=1e-8)
        levels = ((piece - low) / unit).round().clamp(min=0).minimum(last) * unit + low
        found.append(torch.where(last == 0, (low + high) / 2, levels))
    return torch.cat(found, dim=2)


def rounded(layer: Any, rope: Rope | None, energy: KeyEnergy, bits: float, form: str | int) -> Tensor:
    """The keys `[1, Hkv, S, D]` of a layer that has read a whole prompt, as a form would give them back."""
    keys = layer.keys
    size = keys.shape[-1]
    added = 8 / size if isinstance(form, str) else 16 / form
    widths = allocate(energy.keys * energy.queries, bits - added)
    positions = torch.arange(keys.shape[2])[None, None]
    basis = fit_channels(keys, positions, None, rope)
    assert basis.spread is not None
    x = basis.coordinates(keys, positions)
    middle = slice(SINK, keys.shape[2] - WINDOW)
    part = x[:, :, middle]
    if isinstance(form, int):
        made = by_page(part, basis.spread, widths, form)
    else:
        of_channels = ChannelFormat(widths, energy.queries)
        if form == FITTED:
            attended = attention(layer)[..., middle]
            basis.spread = fitted_spread(basis.spread, [part], [of_channels], attended)
        made = by_token(part, basis.spread, of_channels)
    centre = basis.centre_at(positions)
    found = keys.clone()
    found[:, :, middle] = (made + (0 if centre is None else centre[:, :, middle if rope else slice(None)])).to(
        keys.dtype
    )
    return found


def attention(layer: Any) -> Tensor:
    """What each token receives in each KV head, `[1, Hkv, S]`, as the library asks for it."""
    view = LayerView(layer.keys, layer.values, layer.call.queries[:, :, -WINDOW:], layer.call.scaling)
    attended = Evictor(CrushConfig()).attended(view)
    assert attended is not None
    return attended.unflatten(1, (layer.keys.shape[1], -1)).mean(2)


@torch.no_grad()
def measure(model: Any, ids: Tensor) -> dict[str, float]:
    """KL of each form."""
    recording = Recording(model, ids)
    reference = Reference(model, recording, None, 24)
    plan = CrushCache(model, CrushConfig(bits=(2.25, 2))).plan
    assert plan.profile is not None
    read: Any = recording._source.layers
    found = {}
    for bits in BITS:
        for form in (FITTED, BY_SQUARES, *PAGES):
            cache: Any = recording.branch(None)
            for index, layer in enumerate(cache.layers):
                energy = KeyEnergy(plan.profile.keys[index], plan.profile.queries[index])
                layer.keys = rounded(read[index], plan.ropes[index], energy, bits, form)
            name = form if isinstance(form, str) else f"a range a channel, pages of {form}"
            found[f"{name}; {bits}"] = reference.compare(cache).kl
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data-dir", type=Path, required=True, help="LongBench's records as JSON lines")
    parser.add_argument("--model")
    parser.add_argument("--chat", action="store_true", help="behind the model's chat template")
    parser.add_argument("--prompts", type=int, default=3, help="of each task")
    parser.add_argument("-o", "--output", type=Path, help="a JSON line for each prompt")
    arguments = parser.parse_args()
    loaded = load(ModelOptions(model=arguments.model, dtype="float32", device="cpu"))
    chat = _chat(loaded.tokenizer) if arguments.chat else None
    found: dict[str, dict[str, list[float]]] = {}
    for name, task in load_tasks(TASKS, TaskSource(arguments.data_dir), loaded.tokenizer).items():
        for prompt, ids in chosen(task, name, loaded.tokenizer, chat, (900, 1900), arguments.prompts, first=True):
            figures = measure(loaded.model, ids)
            print(name, prompt.id, {form: round(kl, 4) for form, kl in figures.items()}, flush=True)
            if arguments.output:
                with arguments.output.open("a") as file:
                    entry = {"model": loaded.name, "task": name, "prompt": prompt.id, "tokens": ids.shape[1]}
                    file.write(json.dumps(entry | {"kl": figures}) + "\n")
            for form, kl in figures.items():
                found.setdefault(form, {}).setdefault(name, []).append(kl)
    print(
        f"\n| keys; bits a number | {loaded.name}: mean KL | worst prompt | minus a scale a token |"
        "\n|---|---:|---:|---:|"
    )
    for form, by_task in found.items():
        base = found[f"{FITTED}; {form.rpartition(' ')[2]}"]
        less = {task: [a - b for a, b in zip(values, base[task], strict=True)] for task, values in by_task.items()}
        mean, gain = macro_mean(by_task), macro_mean(less)
        worst = max(kl for values in by_task.values() for kl in values)
        print(f"| {form} | {mean.mean:.4f} | {worst:.3f} | {gain.mean:+.4f} ({gain.low:+.4f} to {gain.high:+.4f}) |")


if __name__ == "__main__":
    main()
