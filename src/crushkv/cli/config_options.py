"""The fields of `CrushConfig` as options, and `--config`."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ..config import CrushConfig
from ..config_text import read_field, read_value
from ..errors import ConfigError
from .options import Group, option

PANEL = "KV cache"


@dataclass(frozen=True)
class _Field:
    """An option for a field of `CrushConfig`. Not given, it is None: then --config or the default holds."""

    name: str
    kind: Any
    metavar: str
    help: str
    flag: str | None = None

    def option(self, defaults: CrushConfig) -> inspect.Parameter:
        value, text = getattr(defaults, self.name), self.help
        if value not in ({}, None):
            shown = ",".join(map(str, value)) if isinstance(value, tuple) else str(value).lower()
            text += f" [dim]default: {shown}[/]"
        flags = {} if self.flag is None else {"flag": self.flag}
        kind = self.kind | None
        return option(self.name, kind, None, help=text, metavar=self.metavar, rich_help_panel=PANEL, **flags)


_FIELDS = (
    _Field("budget", str, "AMOUNT", "What is kept: 0.25 or 25% of the bytes, 1024 tokens, or 64MiB."),
    _Field("min_tokens", int, "TOKENS", "A fraction leaves shorter prompts as they are; 0 compresses all."),
    _Field("policy", str, "NAME", "What is important: `crushkv policies`."),
    _Field("policy_options", list[str], "NAME=VALUE", "A policy's option: kernel=5. Repeatable.", "--policy-option"),
    _Field("sink", int, "TOKENS", "First tokens, always kept."),
    _Field("window", int, "TOKENS", "Last tokens, always kept."),
    _Field("page_size", int, "TOKENS", "Unit of what is kept between them."),
    _Field("representative_share", str, "SHARE", "Share of representatives of what is evicted."),
    _Field("anchor", str, "NAME", "Compared with signatures: mean, inverse_mean, alternating, random, zeros, ones."),
    _Field("grouping", str, "KIND", "Buckets by signature, random or position; or score."),
    _Field("bits", str, "BITS", "Of important tokens: 16, 8, 4, 3, 2, or 2.25/2 for keys and values."),
    _Field("representative_bits", str, "BITS", "Of representatives. [dim]default: as --bits[/]"),
    _Field("recent_bits", int, "BITS", "Of sink and window."),
    _Field("key_widths", str, "KIND", "Bits of key channels: by_channel or equal."),
    _Field("logit_limit", str, "NATS", "A layer whose logits change by more gets wider channels; none: never."),
    _Field("profile", str, "FILE", "Profile of the model, from `crushkv profile`. [dim]default: looked for[/]"),
    _Field("group_size", int, "NUMBERS", "Numbers of a token that share a scale."),
    _Field("rotation", str, "BOOL", "Rotate before quantizing: true or false."),
    _Field("rank", str, "RANK", "Project onto so many directions, or onto a share (0.9) of the energy."),
    _Field("aggregate", str, "KIND", "Scores of heads that share a KV head: mean or max."),
    _Field("interval", int, "TOKENS", "Decoded between two evictions; 0 never evicts."),
    _Field("seed", int, "NUMBER", "Of all that is drawn at random, sampling too."),
)
_CONFIG_FILE = option(
    "config_file",
    Path | None,
    None,
    flag="--config",
    metavar="NAME|FILE",
    help="safe, balanced, small, or a JSON file of these settings; options given beside it win.",
    rich_help_panel=PANEL,
)


def build_config(defaults: CrushConfig, config_file: Path | None = None, **given: Any) -> CrushConfig:
    """The configuration of a file (or the defaults), with the options that were given in place of its fields.

    Raises:
        ConfigError: names the file or the option.
    """
    base = defaults
    if config_file is not None:
        try:
            base = CrushConfig.load(config_file)
        except ConfigError as error:
            raise ConfigError(f"--config {str(config_file)!r}: {error}") from None
    changes = {name: _read(name, value) for name, value in given.items() if value not in (None, [])}
    if "policy_options" in changes and changes.get("policy", base.policy) == base.policy:
        changes["policy_options"] = {**base.policy_options, **changes["policy_options"]}
    return base.replace(**changes)


def _read(name: str, value: Any) -> Any:
    """Text as the field has it; checked by `CrushConfig`."""
    if name == "policy_options":
        return _assignments(value)
    return read_field(name, value) if isinstance(value, str) else value


def _assignments(pairs: list[str]) -> dict[str, Any]:
    """`kernel=5` to `{"kernel": 5}`; what is no JSON value is a string."""
    options: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not name or not equals:
            raise ConfigError(f"--policy-option {pair!r}: accepted is NAME=VALUE, for example kernel=5")
        options[name] = read_value(text)
    return options


def config_group(defaults: CrushConfig) -> Group:
    """The options, for a command with defaults of its own."""
    return Group((*(field.option(defaults) for field in _FIELDS), _CONFIG_FILE), partial(build_config, defaults))


CONFIG = config_group(CrushConfig())
