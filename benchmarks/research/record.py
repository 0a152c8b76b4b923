"""Reads prompts once with the full cache and writes what `trial.py` needs of each to a folder.

    python benchmarks/research/record.py --data-dir DIR -o FOLDER [--per-task 14]

A file a prompt: keys, values and last queries of every layer (after RoPE), the mean square of all queries, the full
cache's greedy answer and its logits. About 90 MB a prompt with the embedded model. Prompts are taken from all tasks in
turn, so that an interrupted run is balanced; files that exist are left alone.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from scores import chosen
from transformers import AutoModelForCausalLM, AutoTokenizer

from crushkv.embedded import embedded_model_path
from crushkv.evaluation.fidelity import Reference
from crushkv.evaluation.recording import Recording
from crushkv.evaluation.tasks import TaskSource, load_tasks

TASKS = (
    "trec_short_1k",
    "samsum_short_1k",
    "triviaqa_short",
    "multi_news",
    "qasper",
    "lcc",
    "retrieval_single_2k",
    "retrieval_multikey_2k",
)
QUERIES = 128  # of the end of the prompt
ANSWER = 21  # tokens, the first of which is not measured


def named(task: Any, name: str, tokenizer: Any, limits: tuple[int, int], count: int) -> Iterator[tuple[str, Any]]:
    """The first prompts of a fitting length, with a name for each that says its half: even or odd."""
    for number, (_, ids) in enumerate(chosen(task, name, tokenizer, None, limits, count, first=True)):
        yield f"{name}-{number:02}", ids


def record(model: Any, ids: torch.Tensor, answer: int = ANSWER) -> dict[str, Any]:
    with torch.no_grad():
        recording = Recording(model, ids)
        reference = Reference(model, recording, None, answer)
        layers: Any = recording._source.layers
        return {
            "keys": torch.stack([layer.keys[0] for layer in layers]),  # [L, Hkv, S, D]
            "values": torch.stack([layer.values[0] for layer in layers]),
            "queries": torch.stack([layer.call.queries[0, :, -QUERIES:] for layer in layers]),  # [L, Hq, T, D]
            "query_square": torch.stack([layer.call.queries[0].square().mean(1) for layer in layers]),  # [L, Hq, D]
            "answer": reference.answer,
            "logits": reference._logits,  # [n - 1, V]
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data-dir", type=Path, required=True, help="LongBench's records as JSON lines")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--per-task", type=int, default=14)
    parser.add_argument("--tokens", type=int, nargs=2, default=(1000, 2600), metavar=("LEAST", "MOST"))
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    path = embedded_model_path()
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    tasks = load_tasks(TASKS, TaskSource(arguments.data_dir), tokenizer)
    streams = [
        named(task, name, tokenizer, tuple(arguments.tokens), arguments.per_task) for name, task in tasks.items()
    ]
    for found in zip_longest(*streams):
        for name, ids in filter(None, found):
            target = arguments.output / f"{name}.pt"
            if not target.exists():
                partial = target.with_suffix(".partial")
                torch.save(record(model, ids), partial)
                partial.rename(target)
                print(name, ids.shape[1], flush=True)


if __name__ == "__main__":
    main()
