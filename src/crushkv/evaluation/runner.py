"""Runs a sweep: each prompt is read once, and every configuration is measured on a branch of that cache."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from ..config import CrushConfig
from ..errors import ConfigError, UnsupportedModelError
from ..hf import CrushCache
from .decoding import Ending, greedy_answers
from .fidelity import Reference
from .recording import Recording
from .results import ResultsFile, Sample, prompt_hash, sample_key
from .stacking import stack
from .sweep import Sweep
from .tasks import Prompt, TaskSource, load_tasks, prompts


@dataclass(frozen=True)
class Subject:
    """The model under test. `description` and `versions` go into every sample.

    prefill_chunk_size: prompts are read in pieces of so many tokens; None: in one.
    """

    model: PreTrainedModel
    tokenizer: Any
    description: dict[str, Any]
    versions: dict[str, Any]
    prefill_chunk_size: int | None = None


@dataclass(frozen=True)
class Item:
    """A prompt with its tokens, and the configurations that are still to be measured on it."""

    prompt: Prompt
    ids: Tensor  # [1, S]
    configs: Mapping[str, CrushConfig | None]


@dataclass(frozen=True)
class Work:
    """What a sweep has to do. `skipped`: prompts a task that were too long or too short."""

    items: list[Item]
    skipped: dict[str, int]
    known: int


def plan_work(sweep: Sweep, subject: Subject, source: TaskSource, results: ResultsFile | None) -> Work:
    """Loads tasks and leaves out what the results have.

    The tasks take turns, so that an interrupted sweep has measured all of them about equally.

    Raises:
        ConfigError: a task is unknown, or no prompt is left.
    """
    tasks = load_tasks(sweep.tasks, source, subject.tokenizer)
    chat = _chat(subject.tokenizer) if sweep.chat else None
    longest = subject.model.config.get_text_config(decoder=True).max_position_embeddings
    turns: list[tuple[int, Item]] = []
    skipped, known, prompts_seen = dict.fromkeys(tasks, 0), 0, 0
    for name, task in tasks.items():
        taken = 0
        for prompt in prompts(task, name, chat, sweep.trim):
            if taken == sweep.limit:
                break
            ids = _encode(subject.tokenizer, prompt.text, sweep.chat)
            room = longest - max(_answer_limit(sweep, prompt), sweep.answer_tokens)
            most = min(room, sweep.max_prompt_tokens or room)
            if not sweep.min_prompt_tokens <= ids.shape[1] <= most:
                skipped[name] += 1
                continue
            taken += 1
            settings = _settings(sweep, prompt)
            text_hash = prompt_hash(prompt.text)
            configs = {
                key: config
                for key, config in sweep.configurations.items()
                if results is None or sample_key(name, prompt.id, text_hash, config, settings) not in results
            }
            known += len(sweep.configurations) - len(configs)
            if configs:
                turns.append((taken, Item(prompt, ids, configs)))
        prompts_seen += taken
    if not prompts_seen:
        raise ConfigError(
            f"no prompt of {', '.join(tasks)} has {sweep.min_prompt_tokens} to "
            f"{sweep.max_prompt_tokens or longest} tokens"
        )
    items = [item for _, item in sorted(turns, key=lambda turn: turn[0])]
    return Work(items, skipped, known)


def run_item(item: Item, sweep: Sweep, subject: Subject, add: Callable[[Sample], None]) -> None:
    """Measures all configurations of one prompt; `add` is given each sample as soon as it is complete."""
    model, prompt = subject.model, item.prompt
    with torch.no_grad():
        recording = Recording(model, item.ids, subject.prefill_chunk_size)
        reference = None
        if "fidelity" in sweep.measures:
            gold = None
            if prompt.gold is not None:
                gold = subject.tokenizer(prompt.gold, add_special_tokens=False, return_tensors="pt").input_ids[0]
            reference = Reference(model, recording, gold, sweep.answer_tokens)
        read = _Read(item, sweep, subject, recording, reference)
        names = list(item.configs)
        for start in range(0, len(names), sweep.batch):
            batch = names[start : start + sweep.batch]
            answers = read.answers(batch) if "score" in sweep.measures else {}
            for name in batch:
                add(read.sample(name, answers.get(name)))


@dataclass(frozen=True)
class _Read:
    """A prompt that was read, and what its caches are compared with (None: with nothing)."""

    item: Item
    sweep: Sweep
    subject: Subject
    recording: Recording
    reference: Reference | None

    def sample(self, name: str, answer: str | None) -> Sample:
        """Measures one configuration. `answer`: what was generated with it, if it was."""
        prompt, config, recording, reference = self.item.prompt, self.item.configs[name], self.recording, self.reference
        held, fidelity = recording.nbytes_at_16_bits, reference.fidelity if reference else None
        if config is not None:
            cache = recording.branch(config)
            assert isinstance(cache, CrushCache)
            held = cache.nbytes_at_16_bits
            fidelity = reference.compare(cache) if reference else None
        return Sample(
            task=prompt.task,
            id=prompt.id,
            prompt_hash=prompt_hash(prompt.text),
            prompt_tokens=recording.tokens,
            name=name,
            config=None if config is None else config.to_dict(),
            settings=_settings(self.sweep, prompt),
            bytes_held=held,
            bytes_full=recording.nbytes_at_16_bits,
            model=self.subject.description,
            versions=self.subject.versions,
            **(asdict(fidelity) if fidelity else {}),
            score=None if answer is None else prompt.score(answer),
            metric=None if answer is None else prompt.metric,
            answer=answer,
        )

    def answers(self, names: Sequence[str]) -> dict[str, str]:
        """Generated answers by configuration: the compressed ones decoded together, the full cache's by itself."""
        configs, recording = self.item.configs, self.recording
        compressed = [name for name in names if configs[name] is not None]
        branches = [recording.branch(configs[name]) for name in compressed]
        caches = [cache for cache in branches if isinstance(cache, CrushCache)]
        groups: list[tuple[list[str], Cache]]
        groups = [([name], recording.branch(None)) for name in names if configs[name] is None]
        try:
            groups += [(compressed, stack(recording.model, caches))] if caches else []
        except UnsupportedModelError:  # layers with sliding windows stay apart
            groups += [([name], cache) for name, cache in zip(compressed, caches, strict=True)]
        ending = Ending(_answer_limit(self.sweep, self.item.prompt), self.item.prompt.until)
        answers: dict[str, str] = {}
        for group, cache in groups:
            texts = greedy_answers(recording, self.subject.tokenizer, cache, len(group), ending)
            answers.update(zip(group, texts, strict=True))
        return answers


def _settings(sweep: Sweep, prompt: Prompt) -> dict[str, Any]:
    settings: dict[str, Any] = {"seed": sweep.seed, "chat": sweep.chat, "measures": sorted(sweep.measures)}
    if prompt.trimmed:
        settings["trimmed"] = True
    if "fidelity" in sweep.measures:
        settings["answer_tokens"] = sweep.answer_tokens
    if "score" in sweep.measures:
        settings["max_new_tokens"] = _answer_limit(sweep, prompt)
    return settings


def _answer_limit(sweep: Sweep, prompt: Prompt) -> int:
    return min(prompt.max_tokens, sweep.max_new_tokens or prompt.max_tokens)


def _encode(tokenizer: Any, text: str, chat: bool) -> Tensor:
    # A chat template brings its special tokens with it.
    ids: Tensor = tokenizer(text, add_special_tokens=not chat, return_tensors="pt", verbose=False).input_ids
    return ids


def _chat(tokenizer: Any) -> Callable[[list[dict[str, str]]], str]:
    if not getattr(tokenizer, "chat_template", None):
        raise ConfigError("chat: the model has no chat template")
    return lambda messages, **_: str(
        tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    )
