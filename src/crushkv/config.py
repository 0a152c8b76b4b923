"""`CrushConfig`: the one configuration that Python, the command line and every engine take."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from .budget import Budget
from .errors import ConfigError, nearest
from .presets import PRESETS
from .text import MOST_JSON, check_bounded, quoted, read_json

# These import torch, which takes seconds. The command line reads the fields of `CrushConfig` for `--help` without it.
if TYPE_CHECKING:
    from .importance import Policy
    from .storage import Formats

Anchor = Literal["mean", "inverse_mean", "alternating", "random", "zeros", "ones"]
Grouping = Literal["signature", "random", "position", "score"]
Aggregate = Literal["mean", "max"]
KeyWidths = Literal["by_channel", "equal"]
HeadBudgets = Literal["equal", "profile"]
Bits = float | tuple[float, int]


@dataclass(frozen=True)
class CrushConfig:
    """What is kept of a KV cache. Frozen, checked when it is made, and equal to its JSON form.

    Attributes:
        budget: what is kept: a fraction of the full cache's bytes (float, or `"25%"`), a number of tokens per KV head
            in each layer (int), or bytes for one sequence over all layers (`"64MiB"`). Everything kept counts. A
            fraction counts 16 bits for a number in the model's dtype, also in a float32 model; where nothing is
            quantized it is as well the fraction of the tokens seen.
        min_tokens: where the budget is a fraction, a row is left as it is, in the model's dtype, until so many of its
            tokens have been seen: a fraction of little takes away facts and frees next to nothing. Padding does not
            count. 0 compresses every prompt. Budgets in tokens or bytes do not read it.
        policy: name of an importance policy (`crushkv policies` lists them).
        policy_options: the policy's own options, for example `{"kernel": 5}` for SnapKV.
        sink: first tokens of a sequence, always kept.
        window: last tokens, always kept; window policies score with the queries of these tokens.
        page_size: unit of the contested part: 1 keeps single tokens, 16 keeps stretches of 16.
        representative_share: share of the contested part that goes to KVCrush's representatives of what is
            evicted, at least 0 and below 1; 0 is importance alone, the default because no other share has
            measured better (docs/accuracy.md).
        anchor: what signatures are compared with: `mean`, `inverse_mean`, `alternating`, `random`, `zeros` or `ones`.
        grouping: `"signature"` is KVCrush; `"random"` and `"position"` are its controls. `"score"` makes no groups: the
            next best scores are the representatives, which only their format tells from the important tokens.
        bits: of the important tokens' numbers: 16 (the model's dtype), 8, 4, 3 or 2; or two such, of keys and of values
            (`"3/2"`). Where channels of the keys have widths of their own, those of keys are their mean, any number
            from 1 to 6 (`"2.25/2"`). Fewer bits leave room for more tokens in the same budget.
        representative_bits: the same for representatives; None: as `bits`, and never more.
        recent_bits: of sink and window after an eviction: 16 (the model's dtype), or a width of at least `bits`. What
            is decoded since is in the model's dtype.
        key_widths: how the bits of a key are divided. `"by_channel"`: each channel has a width of its own, 0 to 6 bits,
            chosen so that the attention logits suffer least; a profile of the model says how much each channel matters
            (`crushkv profile`). `"equal"`: all channels have the same width, and keys are rotated first, as values
            always are. Keys in 8 bits and projected keys (`rank`) have equal widths in any case.
        logit_limit: where the widths of a layer's key channels change the logits of the prompt's last queries by more
            than so many nats (root mean square), the layer gets a bit more for each key number, until they do not, and
            keeps fewer tokens for it. None: never. At 2.25 bits the worst layers of SmolLM2-135M and
            Qwen2.5-Coder-0.5B have 0.4 and 0.6; prompts are lost where a layer has several.
        profile: file with the model's profile. None: it is looked for, and made once where there is none.
        group_size: numbers of one token that share a scale, at most.
        rotation: rotate values, and keys of equal widths, before they are quantized.
        rank: project keys and values onto so many (int) leading singular directions of each head, or onto those that
            cover a share of the energy (float below 1); None: onto none. Found once, at the end of the first prompt.
        aggregate: how the scores of the query heads that share a KV head are joined.
        heads: how a budget is divided among the KV heads. `"equal"`: all heads keep the same number of tokens.
            `"profile"`: half of the budget goes to all heads alike, and half to each as much as it needs, which a
            profile of the model says (`crushkv profile`); their sum is the budget.
        interval: while decoding, tokens between two evictions, in the model's dtype until then: a layer holds at most
            budget + interval tokens. 0 never evicts (or quantizes) while decoding.
        seed: of everything drawn at random.

    Raises:
        ConfigError: a field has a value that is not accepted; the message names it.
    """

    budget: float | int | str = 0.25
    min_tokens: int = 512
    policy: str = "readahead"
    policy_options: Mapping[str, Any] = field(default_factory=dict, hash=False)
    sink: int = 4
    window: int = 32
    page_size: int = 16
    representative_share: float = 0.0
    anchor: Anchor = "mean"
    grouping: Grouping = "signature"
    bits: Bits = 16
    representative_bits: Bits | None = None
    recent_bits: int = 16
    key_widths: KeyWidths = "by_channel"
    logit_limit: float | None = 1.0
    profile: str | None = None
    group_size: int = 64
    rotation: bool = True
    rank: int | float | None = None
    aggregate: Aggregate = "mean"
    heads: HeadBudgets = "equal"
    interval: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            check_bounded(f.name, getattr(self, f.name))
        if not isinstance(self.policy_options, Mapping):
            raise ConfigError(f"policy_options={self.policy_options!r}: accepted is a mapping of option to value")
        object.__setattr__(self, "policy_options", dict(self.policy_options))
        for name in ("bits", "representative_bits"):
            object.__setattr__(self, name, _as_bits(name, getattr(self, name)))
        if isinstance(self.profile, Path):
            object.__setattr__(self, "profile", str(self.profile))
        self._check_numbers()
        self._check_choices()
        self._check_formats()
        self._check_budget()
        self._check_policy()

    def _check_numbers(self) -> None:
        least = {"min_tokens": 0, "sink": 0, "window": 1, "page_size": 1, "group_size": 1, "interval": 0, "seed": 0}
        for name, minimum in least.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
                raise ConfigError(f"{name}={value!r}: accepted is an integer of at least {minimum}")
        if self.seed >= 2**63:
            raise ConfigError(f"seed={self.seed}: accepted is an integer below 2**63")
        share = self.representative_share
        if not (_is_number(share) and 0 <= share < 1):
            raise ConfigError(f"representative_share={share!r}: accepted is a number of at least 0 and below 1")
        if not isinstance(self.rotation, bool):
            raise ConfigError(f"rotation={self.rotation!r}: accepted is true or false")
        rank = self.rank
        if rank is not None and not (_is_number(rank) and (rank >= 1 if isinstance(rank, int) else 0 < rank < 1)):
            raise ConfigError(
                f"rank={rank!r}: accepted is a number of directions (an integer of at least 1), or a share of the "
                "energy (above 0 and below 1)"
            )

    def _check_choices(self) -> None:
        for name, known in (
            ("anchor", get_args(Anchor)),
            ("grouping", get_args(Grouping)),
            ("aggregate", get_args(Aggregate)),
            ("key_widths", get_args(KeyWidths)),
            ("heads", get_args(HeadBudgets)),
        ):
            value = getattr(self, name)
            if value not in known:
                raise ConfigError(f"{name}={value!r}: unknown.{nearest(str(value), known)}")
        if self.heads == "profile" and self.representative_share and self.grouping != "score":
            raise ConfigError(
                f"heads='profile' with grouping={self.grouping!r}: KVCrush compares tokens over all heads of a layer, "
                "which then keep the same number of tokens. Use heads='equal', or grouping='score'"
            )

    def _check_formats(self) -> None:
        from .storage import RAW, WIDTHS

        if isinstance(self.recent_bits, bool) or self.recent_bits not in WIDTHS:
            raise ConfigError(f"recent_bits={quoted(self.recent_bits)}: accepted are {', '.join(map(str, WIDTHS))}")
        limit = self.logit_limit
        if limit is not None and not (_is_number(limit) and limit > 0):
            raise ConfigError(f"logit_limit={limit!r}: accepted is a number above 0, or null")
        if self.profile is not None and (not isinstance(self.profile, str) or not self.profile):
            raise ConfigError(f"profile={self.profile!r}: accepted is the path of a file")
        formats = self.formats
        for name in ("bits", "representative_bits"):
            bits = getattr(self, name)
            keys = bits[0] if isinstance(bits, tuple) else bits
            if keys is not None and keys not in WIDTHS and not formats.by_channel:
                raise ConfigError(
                    f"{name}={bits!r}: {keys} bits are a mean of channels with widths of their own, which needs "
                    "key_widths='by_channel' and no rank"
                )
        for of, important, representative in zip(
            ("keys", "values"), formats.important, formats.representative, strict=True
        ):
            if representative > important:
                raise ConfigError(
                    f"representative_bits={self.representative_bits!r}: {of} of representatives would take more "
                    f"bits than those of important tokens (bits={self.bits!r})"
                )
            if representative < important == RAW:
                raise ConfigError(
                    f"representative_bits={self.representative_bits!r} beside unquantized important tokens: a token "
                    "that goes from one tier to the other and back would be quantized again and again. Use "
                    "bits=8, which loses next to nothing"
                )
        if self.recent_bits < max(formats.important):
            raise ConfigError(f"recent_bits={self.recent_bits}: accepted is no less than bits={self.bits!r}")

    def _check_budget(self) -> None:
        budget = self.parsed_budget
        always = self.sink + self.window
        if budget.kind == "tokens" and budget.amount < always:
            raise ConfigError(
                f"budget={self.budget!r} tokens is smaller than sink + window = {self.sink} + {self.window}, which are "
                "always kept: raise the budget, or lower sink or window"
            )
        if budget.kind == "tokens" and self.page_size > budget.amount - always > 0:
            raise ConfigError(
                f"page_size={self.page_size} does not fit: budget={self.budget!r} leaves "
                f"{budget.amount - always} tokens besides sink + window = {always}"
            )

    def _check_policy(self) -> None:
        if not isinstance(self.policy, str):
            raise ConfigError(f"policy={quoted(self.policy)}: accepted is the name of a policy")
        if self.make_policy().layer_budget != "uniform" and self.heads == "profile":
            raise ConfigError(
                f"heads='profile' with policy={self.policy!r}: both divide the budget among the layers. Use "
                "heads='equal', or another policy"
            )

    def make_policy(self) -> Policy:
        """The importance policy that `policy` and `policy_options` name."""
        from .importance import make_policy

        return make_policy(self.policy, self.policy_options)

    @property
    def parsed_budget(self) -> Budget:
        return Budget.parse(self.budget)

    @property
    def untouched_below(self) -> int:
        """Rows that have seen fewer real tokens are left as they are: `min_tokens`, or 0 where it is not read."""
        return self.min_tokens if self.parsed_budget.kind == "fraction" else 0

    @property
    def formats(self) -> Formats:
        """The formats of the tiers, as `crushkv.storage` takes them."""
        from .storage import WIDEST, Formats

        important = _pair(self.bits)
        representative = important if self.representative_bits is None else _pair(self.representative_bits)
        recent = _pair(self.recent_bits)
        narrow = any(keys <= WIDEST for keys, _ in (important, representative, recent))
        by_channel = narrow and self.key_widths == "by_channel" and self.rank is None
        return Formats(important, representative, recent, by_channel, self.group_size, self.rotation, self.rank)

    def replace(self, **changes: Any) -> CrushConfig:
        """A copy with some fields changed, checked again. With another policy, the options are those given here."""
        values = self.to_dict()
        if changes.get("policy", self.policy) != self.policy:
            values["policy_options"] = {}
        return CrushConfig.from_dict({**values, **changes})

    def to_dict(self) -> dict[str, Any]:
        """Plain values only, as JSON has them."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        for name in ("bits", "representative_bits"):
            if isinstance(values[name], tuple):
                values[name] = "/".join(map(str, values[name]))
        values["policy_options"] = dict(self.policy_options)
        return values

    @classmethod
    def preset(cls, name: str) -> CrushConfig:
        """One of the presets, `safe`, `balanced`, `small` and `tiny`.

        Raises:
            ConfigError: there is none of that name.
        """
        if name not in PRESETS:
            raise ConfigError(f"unknown preset {name!r}.{nearest(name, PRESETS)}")
        return cls.from_dict(PRESETS[name])

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> CrushConfig:
        known = {f.name for f in dataclasses.fields(cls)}
        for name in values:
            if name not in known:
                raise ConfigError(f"unknown field {quoted(name)}.{nearest(str(name), known)}")
        try:
            return cls(**values)
        except TypeError as error:
            raise ConfigError(f"configuration: {error}") from None

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_json(cls, text: str) -> CrushConfig:
        values = read_json(text, "configuration")
        if not isinstance(values, dict):
            raise ConfigError("configuration: expected a JSON object of fields")
        return cls.from_dict(values)

    @classmethod
    def load(cls, path: str | Path) -> CrushConfig:
        """Reads a JSON file; or a preset, by its name."""
        if str(path) in PRESETS:
            return cls.preset(str(path))
        try:
            with open(path, encoding="utf-8") as file:
                text = file.read(MOST_JSON + 1)
        except FileNotFoundError:
            raise ConfigError(
                f"configuration {quoted(str(path))}: no such file, and no such preset.{nearest(str(path), PRESETS)}"
            ) from None
        except (OSError, ValueError) as error:  # also of a path with a zero in it, or text that is not UTF-8
            raise ConfigError(f"configuration {quoted(str(path))}: {error}") from None
        try:
            return cls.from_json(text)
        except ConfigError as error:
            raise ConfigError(f"configuration {quoted(str(path))}: {error}") from None


def _pair(bits: Bits) -> tuple[float, int]:
    """Bits of keys and of values."""
    return bits if isinstance(bits, tuple) else (bits, int(bits))


def _as_bits(name: str, value: object) -> object:
    """A width, or two, checked: from 4, (3, 2), [2.25, 2] or "2.25/2"."""
    from .storage import WIDEST, WIDTHS

    if value is None and name == "representative_bits":
        return None
    parts = value.split("/") if isinstance(value, str) else value if isinstance(value, (list, tuple)) else [value]
    numbers = tuple(_as_number(part) for part in parts)
    if 1 <= len(numbers) <= 2 and numbers[-1] in WIDTHS:
        keys = numbers[0]
        if keys in WIDTHS or (keys is not None and len(numbers) == 2 and 1 <= keys <= WIDEST):
            return keys if len(set(numbers)) == 1 else numbers
    widths = ", ".join(map(str, WIDTHS))
    raise ConfigError(
        f"{name}={value!r}: accepted are {widths}, or two of them for keys and values ('3/2'). Then the bits of keys "
        f"may be any number from 1 to {WIDEST} ('2.25/2')"
    )


def _as_number(part: object) -> float | None:
    """A number, whole where it is; None: it is none."""
    if isinstance(part, str):
        if not re.fullmatch(r"\s*\d{1,2}(\.\d{1,6})?\s*", part):
            return None
        part = float(part)
    if not _is_number(part):
        return None
    number = float(part)  # type: ignore[arg-type]
    return int(number) if number.is_integer() else number


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
