"""Configurations as text."""

from __future__ import annotations

import pytest

from crushkv import CrushConfig
from crushkv.config_text import expand, parse_config
from crushkv.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "fields"),
    [
        ("snapkv", {}),
        ("snapkv:budget=0.25", {"budget": 0.25}),
        ("snapkv:budget=25%", {"budget": "25%"}),
        ("snapkv:budget=1024, page_size=1", {"budget": 1024, "page_size": 1}),
        ("snapkv:budget=64MiB", {"budget": "64MiB"}),
        ("snapkv:kernel=5,pooling=avg", {"policy_options": {"kernel": 5, "pooling": "avg"}}),
        ("snapkv:anchor=zeros", {"anchor": "zeros"}),
        ("h2o:representative_share=0.1", {"policy": "h2o", "representative_share": 0.1}),
        ("random:seed=3,rotation=false", {"policy": "random", "seed": 3, "rotation": False}),
    ],
)
def test_text_names_fields(text: str, fields: dict[str, object]) -> None:
    assert parse_config(text) == CrushConfig(**{"policy": "snapkv", **fields})  # type: ignore[arg-type]


def test_without_a_name_the_policy_is_the_default_one() -> None:
    assert parse_config("budget=0.25") == CrushConfig(budget=0.25)
    assert parse_config(" budget=0.25, window=16,ahead=8") == CrushConfig(
        budget=0.25, window=16, policy_options={"ahead": 8}
    )


def test_a_preset_keeps_what_the_text_does_not_change() -> None:
    small = CrushConfig.preset("small")
    assert parse_config("small:kernel=5") == small.replace(policy_options={"kernel": 5})
    assert parse_config("small:window=16,budget=0.1") == small.replace(window=16, budget=0.1)


def test_full_is_no_configuration() -> None:
    assert parse_config("full") is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("snapvk", "snapkv"),
        ("ful", "full"),
        ("full:budget=0.5", "unknown policy"),
        ("snapkv:bugdet=0.5", "budget"),
        ("snapkv:kernal=5", "kernel"),
        ("snapkv:budget", "FIELD=VALUE"),
        ("snapkv:budget=", "FIELD=VALUE"),
        ("snapkv:budget=0.5,budget=0.25", "twice"),
        ("snapkv:policy=h2o", "once, in front"),
        ("policy=h2o,budget=0.5", "h2o:FIELD"),
        ("bugdet=0.5", "budget"),
        ("budget=0.5:window=16", "budget"),
        ("snapkv:budget=7", "budget"),
        ("snapkv:anchor=mode", "mode"),
        ("snapkv:kernel=4", "odd"),
        ("snapkv:policy_options=0,kernel=5", "name the options themselves"),
        ("snapkv:policy_options=0", "policy_options"),
        ("", "unknown policy"),
    ],
)
def test_what_is_wrong_is_named(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        parse_config(text)
    assert repr(text) in str(error.value)


def test_braces_stand_for_their_alternatives() -> None:
    assert expand("{h2o,snapkv}:budget={0.5,0.25}") == [
        "h2o:budget=0.5",
        "h2o:budget=0.25",
        "snapkv:budget=0.5",
        "snapkv:budget=0.25",
    ]
    assert expand("full") == ["full"]
