"""Tasks of lm-evaluation-harness, and their prompts."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ..errors import ConfigError, CrushError, nearest
from . import retrieval
from .longbench import PREFIX, local_task


class HarnessError(CrushError):
    """lm-evaluation-harness is missing, or cannot load a task."""


@dataclass(frozen=True)
class TaskSource:
    """Where tasks come from.

    Attributes:
        data_dir: folder of `.jsonl` files in LongBench's format; a task's name is then a file's. None: the
            harness's own data.
        haystack: text for the retrieval tasks; None: the bundled document.
        seed: of the retrieval prompts.
    """

    data_dir: Path | None = None
    haystack: Path | None = None
    seed: int = 0


@dataclass(frozen=True)
class Prompt:
    """One prompt of a task.

    Attributes:
        id: of the record within its task.
        trimmed: spaces were cut off the end of `text`.
        gold: a right answer, ready to follow `text`. None: the task has none.
        until: strings that end an answer. max_tokens: its length, at most.
        score: the task's main metric of an answer. metric: its name.
    """

    task: str
    id: str
    text: str
    gold: str | None
    until: tuple[str, ...]
    max_tokens: int
    score: Callable[[str], float]
    metric: str
    trimmed: bool = False


def load_tasks(names: Sequence[str], source: TaskSource, tokenizer: Any) -> dict[str, Any]:
    """Harness tasks by the given names.

    A name is a file of `data_dir`, a retrieval task (`retrieval_single_2k`, ...), or any task of the harness;
    `qasper` is short for `longbench_qasper`.

    Raises:
        ConfigError: a name is unknown.
        DataError: a file of data cannot be used.
        HarnessError: the harness is missing, or fails.
    """
    with quiet():
        manager = _task_manager()
        known = set(manager.all_subtasks)
        loaded = {}
        for name in dict.fromkeys(names):
            spec = _spec(name, source, tokenizer, known)
            try:
                loaded[name] = _single(manager.load([spec])["tasks"], name)
            except CrushError:
                raise
            except Exception as error:
                reason = f"{type(error).__name__}: {error}"
                hint = " Local files are read with a data folder." if isinstance(spec, str) else ""
                raise HarnessError(f"task {name!r} does not load: {reason}.{hint}") from error
    return loaded


def _spec(name: str, source: TaskSource, tokenizer: Any, known: set[str]) -> Any:
    if name.startswith(retrieval.PREFIX):
        return retrieval.retrieval_task(name, tokenizer, source.haystack, source.seed)
    if source.data_dir is not None:
        # The harness lets the members of a group override a task that it knows.
        return {"group": f"local {name}", "task": [local_task(name, source.data_dir, known)]}
    if name in known:
        return name
    if PREFIX + name in known:
        return PREFIX + name
    shorts = [task.removeprefix(PREFIX) for task in known if task.startswith(PREFIX)]
    raise ConfigError(f"unknown task {name!r}.{nearest(name, [*known, *shorts, *retrieval.names()])}")


def _single(tasks: dict[str, Any], name: str) -> Any:
    (task,) = tasks.values()
    task.config.task = name  # a local file's tasks go by its name
    return task


@cache
def _task_manager() -> Any:
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise HarnessError(
            f"evaluation needs lm-evaluation-harness ({error}): install crushkv with its extra, crushkv[eval]"
        ) from None
    return TaskManager()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hides the harness's messages about what it loads."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def prompts(
    task: Any, name: str, chat: Callable[[list[dict[str, str]]], str] | None = None, trim: bool = False
) -> Iterator[Prompt]:
    """The prompts of a generating task, in order.

    Args:
        chat: renders messages with the model's chat template, up to where the answer begins; None: plain text.
        trim: cut spaces off the end of prompts. Most tokenizers make a space part of the next word, and models answer
            badly after a space of its own.

    Raises:
        ConfigError: the task's answers are not generated.
    """
    if task.OUTPUT_TYPE != "generate_until":
        raise ConfigError(
            f"task {name!r} is scored by {task.OUTPUT_TYPE}, not by a generated answer: use `crushkv eval` for it"
        )
    options = dict(task.config.generation_kwargs or {})
    until = options.get("until") or []
    metric = str(task.config.metric_list[0]["metric"])
    for index, doc in enumerate(task.eval_docs):
        text = task.fewshot_context(
            doc, 0, apply_chat_template=chat is not None, chat_template=chat, gen_prefix=task.doc_to_prefix(doc)
        )
        whole, text = text, text.rstrip(" ") if trim else text
        yield Prompt(
            task=name,
            id=str(doc.get("id", doc.get("_id", index))),
            text=text,
            trimmed=text != whole,
            gold=_gold(task.doc_to_target(doc), text),
            until=tuple([until] if isinstance(until, str) else until),
            max_tokens=int(options.get("max_gen_toks", 256)),
            score=lambda answer, doc=doc: float(task.process_results(doc, [answer])[metric]),  # type: ignore[misc]
            metric=metric,
        )


def _gold(target: Any, prompt: str) -> str | None:
    if isinstance(target, (list, tuple)):
        target = target[0] if target else None
    if not isinstance(target, str) or not target.strip():
        return None
    return target if prompt[-1:].isspace() or target[:1].isspace() else f" {target}"
