"""How steady the needs of heads are: profiles made from single texts, and what the cache loses with each.

    python benchmarks/accuracy/head_profiles.py --data-dir DIR [--model FOLDER --chat] [--prompts 8]

For each of the bundled texts, and for all of them: how the shares of heads at an eighth of the tokens correlate with
those from all texts, and the KL divergence of `small` and `tiny` to the full cache along its answer (mean, and the
mean of the differences to the profile from all texts, with a 95 % interval). `equal` is equal heads.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy
import torch
from scipy.stats import bootstrap
from transformers import AutoModelForCausalLM, AutoTokenizer

from crushkv import CrushConfig, profile_model
from crushkv.core import HeadNeeds
from crushkv.embedded import embedded_model_path
from crushkv.evaluation import Sweep
from crushkv.evaluation.fidelity import Reference
from crushkv.evaluation.recording import Recording
from crushkv.evaluation.runner import Subject, plan_work
from crushkv.evaluation.tasks import TaskSource
from crushkv.hf.profiling import TEXTS
from crushkv.profile import Profile

TASKS = ("trec_short_1k", "samsum_short_1k", "multi_news", "lcc")
PRESETS = ("small", "tiny")
ANSWER_TOKENS = 32


def shares(profile: Profile) -> torch.Tensor:
    """What each head of each layer keeps where all heads keep an eighth on average."""
    needs = HeadNeeds(profile.needs)
    return torch.cat([needs.parts(layer, torch.tensor([0.125]))[0] for layer in range(len(profile.needs))])


def profiles(model: Any, tokenizer: Any, folder: Path) -> dict[str, str]:
    """Files of the profiles, by the name of the text that was read."""
    files, found = {}, {}
    for name, texts in {"all": TEXTS, **{text: (text,) for text in TEXTS}}.items():
        found[name] = profile_model(model, tokenizer, texts=texts)
        files[name] = str(found[name].save(folder / f"{name}.safetensors").path)
        correlation = torch.corrcoef(torch.stack([shares(found["all"]), shares(found[name])]))[0, 1]
        print(f"{name}: shares of heads correlate with those from all texts at {correlation:.3f}", flush=True)
    return files


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--model", default=None, help="folder of a model; default: the embedded one")
    parser.add_argument("--chat", action="store_true")
    parser.add_argument("--prompts", type=int, default=8)
    asked = parser.parse_args()
    path = asked.model or embedded_model_path()
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    limits = {"min_prompt_tokens": 800, "max_prompt_tokens": 2600, "limit": -(-asked.prompts // len(TASKS))}
    sweep = Sweep.from_dict({"tasks": TASKS, "configurations": ["full"], "chat": asked.chat, "trim": True, **limits})
    work = plan_work(sweep, Subject(model, tokenizer, {}, {}), TaskSource(asked.data_dir), None)
    with tempfile.TemporaryDirectory() as folder:
        files: dict[str, str | None] = {**profiles(model, tokenizer, Path(folder)), "equal": None}
        kl: dict[tuple[str, str], list[float]] = {}
        for number, item in enumerate(work.items):
            print(f"{number + 1} of {len(work.items)}", flush=True)
            recording = Recording(model, item.ids)
            reference = Reference(model, recording, None, ANSWER_TOKENS)
            for preset in PRESETS:
                for name, file in files.items():
                    own = {"heads": "equal"} if file is None else {"profile": file}
                    cache = recording.branch(CrushConfig.preset(preset).replace(interval=0, **own))
                    found = reference.compare(cache)  # type: ignore[arg-type]
                    kl.setdefault((preset, name), []).append(found.kl)
    for (preset, name), values in kl.items():
        difference = numpy.subtract(values, kl[preset, "all"])
        line = f"{preset:6s} {name:9s} {numpy.mean(values):.4f}"
        if difference.any():
            interval = bootstrap((difference,), numpy.mean, method="percentile", rng=0).confidence_interval
            line += f"  {difference.mean():+.4f} ({interval.low:+.4f} to {interval.high:+.4f})"
        print(line)


if __name__ == "__main__":
    main()
