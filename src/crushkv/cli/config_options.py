"""The fields of `CrushConfig` as options, and `--config`."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..config import CrushConfig
from ..errors import ConfigError
from .options import Group, option

PANEL = "KV cache"
DEFAULTS = CrushConfig()


def _field(name: str, kind: Any, metavar: str, help: str, flag: str | None = None) -> inspect.Parameter:
    """An option for a field of `CrushConfig`. Not given, it is None: then --config or the default holds."""
    value = getattr(DEFAULTS, name)
    if value != {}:
        text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value).lower()
        help += f" [dim]default: {text}[/]"
    flags = {} if flag is None else {"flag": flag}
    return option(name, kind | None, None, help=help, metavar=metavar, rich_help_panel=PANEL, **flags)


CONFIG_FIELDS = (
    _field("budget", str, "AMOUNT", "What is kept: 0.25 or 25% of the tokens, 1024 tokens, or 64MiB."),
    _field("policy", str, "NAME", "What is important: `crushkv policies`."),
    _field("policy_options", list[str], "NAME=VALUE", "A policy's option: kernel=5. Repeatable.", "--policy-option"),
    _field("sink", int, "TOKENS", "First tokens, always kept."),
    _field("window", int, "TOKENS", "Last tokens, always kept."),
    _field("page_size", int, "TOKENS", "Unit of what is kept between them."),
    _field("representative_share", str, "SHARE", "Share of representatives of what is evicted, or dynamic."),
    _field("coverage", float, "SHARE", "With dynamic: attention mass of the important tokens."),
    _field("share_bounds", str, "LOW,HIGH", "With dynamic: least and greatest share."),
    _field("threshold", str, "KIND", "A signature bit is 1 above: budget or median."),
    _field("signature", str, "KIND", "Bits of a signature: per_head or collapsed."),
    _field(
        "anchors",
        list[str],
        "NAME",
        "Compared with signatures: mean, inverse_mean, alternating, random, zeros, ones. Repeatable.",
        "--anchor",
    ),
    _field("grouping", str, "KIND", "Buckets by signature, random or position."),
    _field("representative", str, "WHICH", "Of a bucket: middle or best."),
    _field("shared_representatives", str, "BOOL", "One set of representatives for all KV heads: true or false."),
    _field("aggregate", str, "KIND", "Scores of heads that share a KV head: mean or max."),
    _field("interval", int, "TOKENS", "Decoded between two evictions; 0 never evicts."),
    _field("seed", int, "NUMBER", "Of all that is drawn at random, sampling too."),
)
_CONFIG_FILE = option(
    "config_file",
    Path | None,
    None,
    flag="--config",
    metavar="FILE",
    help="JSON file of these settings; options given beside it win.",
    rich_help_panel=PANEL,
)


def build_config(config_file: Path | None = None, **given: Any) -> CrushConfig:
    """The configuration of a file (or the defaults), with the options that were given in place of its fields.

    Raises:
        ConfigError: names the file or the option.
    """
    base = DEFAULTS
    if config_file is not None:
        try:
            base = CrushConfig.load(config_file)
        except ConfigError as error:
            raise ConfigError(f"--config {str(config_file)!r}: {error}") from None
    changes = {name: _READ.get(name, _same)(value) for name, value in given.items() if value not in (None, [])}
    same_policy = changes.get("policy", base.policy) == base.policy
    if "policy_options" in changes or not same_policy:  # another policy's options mean nothing to this one
        changes["policy_options"] = {
            **(base.policy_options if same_policy else {}),
            **changes.get("policy_options", {}),
        }
    return base.replace(**changes)


def _same(value: Any) -> Any:
    return value


def _number(text: str) -> int | float | str:
    """A number where it is one, so that the configuration's JSON form has numbers; checked by `CrushConfig`."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _flag(text: str) -> bool | str:
    """Checked by `CrushConfig` where it is neither."""
    return {"true": True, "yes": True, "false": False, "no": False}.get(text.lower(), text)


def _pair(text: str) -> tuple[Any, ...]:
    return tuple(_number(part.strip()) for part in text.split(","))


def _assignments(pairs: list[str]) -> dict[str, Any]:
    """`kernel=5` to `{"kernel": 5}`; what is no JSON value is a string."""
    options: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not name or not equals:
            raise ConfigError(f"--policy-option {pair!r}: accepted is NAME=VALUE, for example kernel=5")
        try:
            options[name] = json.loads(text)
        except json.JSONDecodeError:
            options[name] = text
    return options


_READ: Mapping[str, Callable[[Any], Any]] = {
    "budget": _number,
    "representative_share": _number,
    "share_bounds": _pair,
    "policy_options": _assignments,
    "shared_representatives": _flag,
}

CONFIG = Group((*CONFIG_FIELDS, _CONFIG_FILE), build_config)
