"""Retrieval prompts in the style of RULER (arXiv 2404.06654), made from a seed and any text.

The harness's own RULER tasks fetch their haystack and a tokenizer's data when they are loaded; these are the same
kinds of prompts without a network, as tasks of the harness.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from ..errors import ConfigError, nearest
from .data import DataError

PREFIX = "retrieval_"
LENGTHS = {"1k": 1024, "2k": 2048, "4k": 4096, "8k": 8192}
# Room for the chat template and the answer, so that `8k` fits models of 8,192 positions.
SLACK = 160
_PROMPTS = 100
_VOCABULARY = (
    "amber anchor apple arrow autumn badger bamboo barrel basket beacon birch blossom bridge bronze butter candle "
    "canyon carpet cedar cherry circle clover cobalt copper coral cotton cradle crystal dagger desert dolphin "
    "donkey dragon eagle ember engine falcon feather fiddle forest fossil garden garlic ginger glacier goblet "
    "granite hammer harbor hazel helmet hollow honey island ivory jacket jasmine jungle kettle ladder lagoon "
    "lantern lemon linen lizard magnet mantle maple marble meadow mirror monkey mortar needle nickel oasis olive "
    "orchid otter oyster paddle palace parrot pebble pepper pigeon pillow planet pocket pollen prairie pumpkin "
    "quartz rabbit raven ribbon river rocket saddle salmon sandal saffron shadow silver sparrow spider summit "
    "tablet teapot temple thistle thunder tiger timber tulip tunnel turtle valley velvet violet walnut willow "
    "window winter yellow zebra"
)
_WORDS = _VOCABULARY.split()


@dataclass(frozen=True)
class Puzzle:
    """What is hidden, and what is asked.

    Attributes:
        needles: sentences to hide, in the order in which they have to stand in the text.
        question: comes after the text; its last words begin the answer.
        answers: strings that the answer has to contain. The score is the share that it contains.
    """

    needles: tuple[str, ...]
    question: str
    answers: tuple[str, ...]


def _number(draw: random.Random) -> str:
    return str(draw.randrange(1_000_000, 10_000_000))


def _secret(key: str, number: str) -> str:
    return f"The secret number for {key} is {number}."


def _single(draw: random.Random) -> Puzzle:
    return _one_of(draw, keys=1)


def _multikey(draw: random.Random) -> Puzzle:
    return _one_of(draw, keys=4)


def _one_of(draw: random.Random, keys: int) -> Puzzle:
    names = draw.sample(_WORDS, keys)
    numbers = [_number(draw) for _ in names]
    wanted = draw.randrange(keys)
    question = (
        f"What is the secret number for {names[wanted]} that the text mentions?\n"
        f"The secret number for {names[wanted]} that the text mentions is"
    )
    return Puzzle(tuple(map(_secret, names, numbers)), question, (numbers[wanted],))


def _multivalue(draw: random.Random) -> Puzzle:
    key = draw.choice(_WORDS)
    numbers = tuple(_number(draw) for _ in range(3))
    question = (
        f"What are all the secret numbers for {key} that the text mentions?\n"
        f"The three secret numbers for {key} that the text mentions are"
    )
    return Puzzle(tuple(_secret(key, number) for number in numbers), question, numbers)


def _variables(draw: random.Random) -> Puzzle:
    """A chain of assignments to follow, and one that leads elsewhere."""
    names = [word.upper() for word in draw.sample(_WORDS, 6)]
    value, other = _number(draw), _number(draw)
    chain = [f"VAR {names[0]} = {value}.", f"VAR {names[1]} = VAR {names[0]}.", f"VAR {names[2]} = VAR {names[1]}."]
    decoy = [f"VAR {names[3]} = {other}.", f"VAR {names[4]} = VAR {names[3]}.", f"VAR {names[5]} = VAR {names[4]}."]
    needles = []
    while chain or decoy:  # both in order, shuffled into each other
        needles.append(draw.choices((chain, decoy), (len(chain), len(decoy)))[0].pop(0))
    question = (
        f"Which variables have the value {value}, directly or through other variables?\n"
        f"The three variables that have the value {value} are"
    )
    return Puzzle(tuple(needles), question, tuple(names[:3]))


def _hex(draw: random.Random) -> str:
    return f"{draw.getrandbits(32):08x}"


KINDS: dict[str, Callable[[random.Random], Puzzle] | None] = {
    "single": _single,
    "multikey": _multikey,
    "multivalue": _multivalue,
    "variables": _variables,
    "pairs": None,  # the text itself is made of pairs
}
ANSWER_TOKENS = {"single": 16, "multikey": 16, "multivalue": 48, "variables": 32, "pairs": 16}


def names() -> list[str]:
    """Every retrieval task: `retrieval_single_1k`, ..."""
    return [f"{PREFIX}{kind}_{length}" for kind in KINDS for length in LENGTHS]


def retrieval_task(name: str, tokenizer: Any, haystack: Path | None, seed: int) -> dict[str, Any]:
    """The configuration of a harness task: 100 prompts of at most the named number of tokens.

    Args:
        haystack: a text file or a folder of them; None is the bundled document.

    Raises:
        ConfigError: no such task, or no such text.
    """
    kind, _, length = name.removeprefix(PREFIX).rpartition("_")
    if kind not in KINDS or length not in LENGTHS:
        raise ConfigError(f"unknown task {name!r}.{nearest(name, names())}")
    sentences = haystack_sentences(haystack)
    tokens = LENGTHS[length] - SLACK

    def dataset(**_: Any) -> dict[str, Any]:
        from datasets import Dataset

        draws = (random.Random(f"{seed} {name} {i}") for i in range(_PROMPTS))
        # The Dataset is written once it is complete, prompts beyond a limit included: they take a moment each.
        records = [{"id": str(i), **make_prompt(kind, tokens, tokenizer, sentences, d)} for i, d in enumerate(draws)]
        return {"test": Dataset.from_list(records)}

    return {
        "task": name,
        "dataset_path": "",
        "custom_dataset": dataset,
        "output_type": "generate_until",
        "test_split": "test",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "{{answers}}",
        "target_delimiter": " ",
        "process_results": score_contained,
        "generation_kwargs": {"max_gen_toks": ANSWER_TOKENS[kind], "do_sample": False, "until": []},
        "metric_list": [{"metric": "score", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1.0},
    }


def score_contained(doc: dict[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Share of the gold strings that the answer contains, whatever their case."""
    answer = results[0].lower()
    return {"score": sum(gold.lower() in answer for gold in doc["answers"]) / len(doc["answers"])}


def make_prompt(
    kind: str, tokens: int, tokenizer: Any, sentences: Sequence[str], draw: random.Random
) -> dict[str, Any]:
    """`prompt` of at most `tokens` tokens, and its `answers`."""
    if kind == "pairs":
        return _pairs_prompt(tokens, tokenizer, draw)
    make = KINDS[kind]
    assert make is not None
    puzzle = make(draw)
    intro = "Some facts are hidden in the following text. Remember them; you will be asked about them.\n\n"
    outro = f"\n\n{puzzle.question}"
    room = tokens - _count(tokenizer, intro + " ".join(puzzle.needles) + outro) - 2 * len(puzzle.needles)
    hay = _hay(room, tokenizer, sentences, draw)
    places = sorted(draw.randrange(len(hay) + 1) for _ in puzzle.needles)
    for place, needle in reversed(list(zip(places, puzzle.needles, strict=True))):
        hay.insert(place, needle)
    return {"prompt": intro + " ".join(hay) + outro, "answers": list(puzzle.answers)}


def _hay(room: int, tokenizer: Any, sentences: Sequence[str], draw: random.Random) -> list[str]:
    """Successive sentences, from a random one on. After the last sentence comes the first."""
    start = draw.randrange(len(sentences))
    hay: list[str] = []
    while True:
        sentence = sentences[(start + len(hay)) % len(sentences)]
        room -= _sentence_tokens(tokenizer, sentence)
        if room < 0:
            return hay
        hay.append(sentence)


def _pairs_prompt(tokens: int, tokenizer: Any, draw: random.Random) -> dict[str, Any]:
    intro = "Each of the following lines has a key and its value.\n\n"
    outro = "\n\nThe value of key {key} is the following.\nkey {key}: value"
    count = _count(tokenizer, intro + outro.format(key=_hex(draw)))
    pairs: list[tuple[str, str]] = []
    while True:
        pair = (_hex(draw), _hex(draw))
        count += _count(tokenizer, f"key {pair[0]}: value {pair[1]}\n")
        if count > tokens - 8:  # a little room, for keys of more tokens than the one above
            break
        pairs.append(pair)
    key, value = draw.choice(pairs)
    lines = "\n".join(f"key {k}: value {v}" for k, v in pairs)
    return {"prompt": intro + lines + outro.format(key=key), "answers": [value]}


def _count(tokenizer: Any, text: str) -> int:
    return len(tokenizer(text, add_special_tokens=False).input_ids)


_counts: dict[tuple[int, str], int] = {}


def _sentence_tokens(tokenizer: Any, sentence: str) -> int:
    key = (id(tokenizer), sentence)
    if key not in _counts:
        _counts[key] = _count(tokenizer, " " + sentence)
    return _counts[key]


@cache
def haystack_sentences(path: Path | None) -> tuple[str, ...]:
    """The sentences of a text file, of a folder's text files, or of the bundled document (None).

    Raises:
        ConfigError: there is no such file or folder.
        DataError: it holds no text.
    """
    if path is None:
        texts = [(resources.files("crushkv") / "demo" / "document.txt").read_text(encoding="utf-8")]
    elif path.exists():
        files = sorted(path.glob("*.txt")) if path.is_dir() else [path]
        texts = [file.read_text(encoding="utf-8", errors="replace") for file in files]
    else:
        raise ConfigError(f"haystack {str(path)!r}: there is no such file or folder")
    sentences = [s for text in texts for s in re.split(r"(?<=[.!?])\s+", " ".join(text.split())) if s]
    if not sentences:
        raise DataError(f"haystack {str(path)!r}: it holds no text")
    return tuple(sentences)
