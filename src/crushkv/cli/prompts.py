"""The prompt: where its text comes from, and how it becomes tokens."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from ..errors import ConfigError, one_line
from ..files import text_of

STDIN = "-"


def read_prompt(prompt: str | None, file: str | None) -> str:
    """The text of `--prompt`, of `--file`, of both (the file first), or of standard input.

    Raises:
        ConfigError: there is none, it is empty, or it cannot be read; the message names the option.
    """
    if prompt is None and file is None:
        if sys.stdin is None or sys.stdin.isatty():
            raise ConfigError("--prompt: no prompt; give --prompt TEXT, --file FILE, or text on standard input")
        file = STDIN
    if prompt == STDIN and file == STDIN:
        raise ConfigError("--prompt and --file: only one of them can be standard input")
    parts = []
    if file is not None:
        parts.append(_standard_input("--file") if file == STDIN else _file(file))
    if prompt is not None:
        parts.append(_standard_input("--prompt") if prompt == STDIN else prompt)
    if not any(part.strip() for part in parts):
        names = [name for name, value in (("--file", file), ("--prompt", prompt)) if value is not None]
        raise ConfigError(f"{' and '.join(names)}: the prompt is empty")
    return "\n\n".join(parts)


def _file(name: str) -> str:
    try:
        return text_of(Path(name).expanduser().read_bytes())
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else one_line(str(error))
        raise ConfigError(f"--file {name!r}: {reason}") from None


def _standard_input(option: str) -> str:
    try:
        return text_of(sys.stdin.buffer.read())
    except ValueError as error:
        raise ConfigError(f"{option} (standard input): {error}") from None


def encode(tokenizer: Any, text: str, chat: bool | None = None, system: str | None = None) -> Any:
    """The prompt as token ids `[1, S]`.

    Args:
        chat: whether the text goes through the tokenizer's chat template; None: where it has one.
        system: the system message that comes before it.

    Raises:
        ConfigError: what is asked for does not go with this tokenizer.
    """
    if not uses_chat(tokenizer, chat, system):
        return tokenizer(text, return_tensors="pt").input_ids
    return apply_chat(tokenizer, text, system, tokenize=True, return_dict=True, return_tensors="pt")["input_ids"]


def uses_chat(tokenizer: Any, chat: bool | None, system: str | None) -> bool:
    """Whether a prompt goes through the chat template; None: where there is one.

    Raises:
        ConfigError: what is asked for does not go with this tokenizer.
    """
    has_template = bool(getattr(tokenizer, "chat_template", None))
    if chat and not has_template:
        raise ConfigError("--chat: the tokenizer of this model has no chat template; use --no-chat")
    if chat is None:
        chat = has_template
    if system is not None and not chat:
        why = "the tokenizer of this model has none" if not has_template else "--no-chat leaves it out"
        raise ConfigError(f"--system: needs the chat template, and {why}")
    return chat


def apply_chat(tokenizer: Any, text: str, system: str | None, **options: Any) -> Any:
    """A user's message through the chat template, up to where the answer begins.

    Raises:
        ConfigError: the template refuses it.
    """
    messages = [{"role": "user", "content": text}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    try:
        return tokenizer.apply_chat_template(messages, add_generation_prompt=True, **options)
    except Exception as error:  # templates raise what they like, for roles that they do not know for example
        option = "--system" if system is not None else "--chat"
        raise ConfigError(
            f"{option}: the chat template of this model refuses the messages: {one_line(str(error))}"
        ) from (error)


def check_room(prompt_tokens: int, new_tokens: int, model_config: Any) -> None:
    """Refuses a prompt, or an answer, that the model has no positions for, and warns where it was made for fewer."""
    from ..hf.support import check_prompt, position_limit, warn_beyond_training

    check_prompt(prompt_tokens, model_config)
    limit = position_limit(model_config)
    if limit is not None and prompt_tokens + new_tokens > limit:
        raise ConfigError(
            f"--max-new-tokens {new_tokens}: the prompt of {prompt_tokens} tokens leaves {limit - prompt_tokens} of "
            f"the model's {limit} positions"
        )
    warn_beyond_training(prompt_tokens + new_tokens, model_config)
