"""Keys rounded per channel (KIVI) and per token, with and without their mean and a rotation: KL to the full cache.

    python benchmarks/accuracy/key_formats.py --data-dir DIR [--prompts 2]

Only keys are rounded; sink and window are left alone. Scales and limits are float16, so that a group of g numbers adds
32 / g bits to each.
"""

from __future__ import annotations

import argparse
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from crushkv.embedded import embedded_model_path
from crushkv.evaluation.fidelity import Reference
from crushkv.evaluation.recording import Recording
from crushkv.evaluation.tasks import TaskSource, load_tasks, prompts
from crushkv.storage.rotation import rotation

TASKS = ("trec_short_1k", "samsum_short_1k", "multi_news", "qasper", "lcc", "retrieval_multikey_2k")
SINK, WINDOW = 4, 32
ROWS = (
    ("per channel, 32 tokens a group (KIVI)", "channel", 32, False),
    ("per channel, 64 tokens a group", "channel", 64, False),
    ("per token", "token", 64, False),
    ("per token, mean off", "mean", 64, False),
    ("per token, mean off and rotated", "mean", 64, True),
)


def rounded(x: Tensor, bits: int, nested: bool) -> Tensor:
    """Groups along the last axis: to 2 ** bits levels from end to end, or to the middles of as many cells (nested)."""
    low = x.amin(-1, keepdim=True).half().float()
    span = (x.amax(-1, keepdim=True) - low).clamp(min=1e-6).half().float()
    if nested:
        cell = span / 2**bits
        return low + (((x - low) / cell).floor().clamp(0, 2**bits - 1) + 0.5) * cell
    step = span / (2**bits - 1)
    return low + ((x - low) / step).round().clamp(0, 2**bits - 1) * step


def simulate(keys: Tensor, axis: str, group: int, rotate: bool, bits: int, nested: bool) -> Tensor:
    """`keys [B, Hkv, P, D]` as the format would give them back."""
    mean = keys.mean(2, keepdim=True) if axis == "mean" else torch.zeros(())
    matrix = rotation(keys.shape[-1], keys.device) if rotate else torch.eye(keys.shape[-1])
    x = (keys - mean) @ matrix
    if axis == "channel":
        pieces = [rounded(piece.transpose(2, 3), bits, nested).transpose(2, 3) for piece in x.split(group, dim=2)]
        x = torch.cat(pieces, dim=2)
    else:
        x = rounded(x.unflatten(-1, (-1, group)), bits, nested).flatten(-2)
    return x @ matrix.T + mean


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data-dir", type=Path, required=True, help="LongBench's records as JSON lines")
    parser.add_argument("--prompts", type=int, default=2, help="of each task")
    arguments = parser.parse_args()
    path = embedded_model_path()
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    found: dict[tuple[str, int, bool], list[float]] = defaultdict(list)
    for name, task in load_tasks(TASKS, TaskSource(arguments.data_dir), tokenizer).items():
        taken = 0
        for prompt in prompts(task, name, None, True):
            ids = tokenizer(prompt.text, return_tensors="pt").input_ids
            if not 1000 <= ids.shape[1] <= 2600:
                continue
            taken += 1
            if taken > arguments.prompts:
                break
            with torch.no_grad():
                recording = Recording(model, ids)
                reference = Reference(model, recording, None, 24)
                for label, axis, group, rotate in ROWS:
                    for bits in (4, 3, 2):
                        for nested in (False, True):
                            cache: Any = recording.branch(None)
                            for layer in cache.layers:
                                middle = slice(SINK, layer.keys.shape[2] - WINDOW)
                                keys = layer.keys.clone()
                                keys[:, :, middle] = simulate(keys[:, :, middle], axis, group, rotate, bits, nested)
                                layer.keys = keys
                            found[label, bits, nested].append(reference.compare(cache).kl)
    print("| keys | bits added | 4 bits | 3 bits | 2 bits | 4, nested | 3, nested | 2, nested |")
    print("|---|" + "---:|" * 7)
    for label, _, group, _ in ROWS:
        cells = [statistics.mean(found[label, b, nested]) for nested in (False, True) for b in (4, 3, 2)]
        print(f"| {label} | {32 / group:.1f} | " + " | ".join(f"{cell:.3f}" for cell in cells) + " |")
    print(f"{len(found[ROWS[0][0], 4, False])} prompts")


if __name__ == "__main__":
    main()
