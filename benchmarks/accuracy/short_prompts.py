"""What a fraction as budget costs in short prompts: how `min_tokens` was chosen.

Four facts, a stretch of the bundled document, and a question about one of the facts. For each length of prompt: how
many of the full cache's answers hold the number that was asked for; and of each configuration how many answers are the
full cache's, token for token, and the KL divergence along it (mean and worst).

    python benchmarks/accuracy/short_prompts.py [--model FOLDER] [--prompts 6]
"""

from __future__ import annotations

import argparse
import random
from importlib import resources
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from crushkv.embedded import embedded_model_path
from crushkv.evaluation import parse_configurations
from crushkv.evaluation.fidelity import Reference
from crushkv.evaluation.recording import Recording
from crushkv.evaluation.token_text import tokenize

CONFIGURATIONS = ("readahead:budget=0.25,min_tokens=0", "{balanced,small}:min_tokens=0")
LENGTHS = (128, 192, 256, 384, 512)
NAMES = ("Nora", "Oskar", "Paula", "Quentin", "Ruth", "Stefan", "Tilda", "Ulrich", "Vera", "Walter", "Xenia", "Zoe")
THINGS = ("room number", "locker number", "bus line", "badge number")
ANSWER_TOKENS = 12


def make_prompt(tokenizer: Any, tokens: int, draw: random.Random) -> tuple[torch.Tensor, str]:
    """A prompt of about `tokens` tokens, and the number that its answer has to hold."""
    facts = [(name, draw.choice(THINGS), str(draw.randrange(100, 1000))) for name in draw.sample(NAMES, 4)]
    name, thing, number = draw.choice(facts)
    start = " ".join(f"The {of} of {who} is {what}." for who, of, what in facts)
    words = (resources.files("crushkv") / "demo" / "document.txt").read_text(encoding="utf-8").split()
    words = words[draw.randrange(len(words) // 2) :]
    end = f"What is the {thing} of {name}? Answer with the number only."
    fits, above = 0, tokens
    while fits < above:  # the most words that fit
        middle = (fits + above + 1) // 2
        if tokenize(tokenizer, "\n\n".join((start, " ".join(words[:middle]), end))).ids.shape[1] <= tokens:
            fits = middle
        else:
            above = middle - 1
    return tokenize(tokenizer, "\n\n".join((start, " ".join(words[:fits]), end))).ids, number


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="folder of a model; default: the embedded one")
    parser.add_argument("--prompts", type=int, default=6, help="of each length")
    asked = parser.parse_args()
    path = asked.model or embedded_model_path()
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    configurations = parse_configurations(CONFIGURATIONS)
    print("tokens  full    " + "  ".join(f"{name.removesuffix(',min_tokens=0'):>22}" for name in configurations))
    for tokens in LENGTHS:
        draw = random.Random(tokens)
        right = 0
        same = dict.fromkeys(configurations, 0)
        kl: dict[str, list[float]] = {name: [] for name in configurations}
        for _ in range(asked.prompts):
            ids, number = make_prompt(tokenizer, tokens, draw)
            recording = Recording(model, ids)
            reference = Reference(model, recording, None, ANSWER_TOKENS)
            right += number in tokenizer.decode(reference.answer)
            for name, config in configurations.items():
                cache = recording.branch(config)
                found = reference.compare(cache)  # type: ignore[arg-type]
                kl[name].append(found.kl)
                same[name] += found.agreement == 1
        cells = (f"{same[name]:3d}, {sum(kl[name]) / asked.prompts:6.3f}, {max(kl[name]):6.3f}" for name in kl)
        print(f"{tokens:6d} {right:4d}/{asked.prompts}  " + "  ".join(f"{cell:>22}" for cell in cells), flush=True)


if __name__ == "__main__":
    main()
