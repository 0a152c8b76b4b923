"""The prompt as options of a command."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .options import Group, option
from .prompts import encode, read_prompt

PANEL = "Prompt"


@dataclass(frozen=True)
class PromptOptions:
    """Where the prompt comes from, and whether it goes through the chat template (None: where there is one)."""

    prompt: str | None = None
    file: str | None = None
    chat: bool | None = None
    system: str | None = None

    def read(self) -> str:
        """The prompt's text; see `read_prompt`."""
        return read_prompt(self.prompt, self.file)

    def encode(self, tokenizer: Any, text: str) -> Any:
        """Its token ids `[1, S]`; see `prompts.encode`."""
        return encode(tokenizer, text, self.chat, self.system)


PROMPT = Group(
    (
        option(
            "prompt",
            str | None,
            None,
            help="The prompt; - is standard input.",
            metavar="TEXT",
            rich_help_panel=PANEL,
        ),
        option(
            "file",
            str | None,
            None,
            help="A file that comes before it; - is standard input.",
            metavar="FILE",
            rich_help_panel=PANEL,
        ),
        option(
            "chat",
            bool | None,
            None,
            flag="--chat/--no-chat",
            help="Use the chat template.",
            show_default="where there is one",
            rich_help_panel=PANEL,
        ),
        option("system", str | None, None, help="System message.", metavar="TEXT", rich_help_panel=PANEL),
    ),
    PromptOptions,
)
