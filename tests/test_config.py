"""`CrushConfig`: what it accepts, what it refuses, and its JSON form."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from crushkv import CrushConfig, KVCrush
from crushkv.errors import ConfigError


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"budget": 0}, "budget=0"),
        ({"budget": 0.0}, "budget=0.0"),
        ({"budget": -0.1}, "budget=-0.1"),
        ({"budget": 1.5}, "budget=1.5"),
        ({"budget": "lots"}, "budget='lots'"),
        ({"budget": 20}, r"budget=20 tokens is smaller than sink \+ window"),
        ({"budget": 40}, "page_size=16 does not fit"),
        ({"representative_share": 1.0}, "representative_share=1.0"),
        ({"representative_share": -0.1}, "representative_share=-0.1"),
        ({"representative_share": float("nan")}, "representative_share=nan"),
        ({"representative_share": "some"}, "representative_share='some'"),
        ({"policy": "h20"}, "policy='h20'.*Did you mean 'h2o'"),
        ({"anchor": "alternate"}, "anchor='alternate'.*Did you mean 'alternating'"),
        ({"anchor": ["mean"]}, r"anchor=\['mean'\]"),
        ({"grouping": "hash"}, "grouping='hash'"),
        ({"aggregate": "sum"}, "aggregate='sum'"),
        ({"page_size": 0}, "page_size=0"),
        ({"page_size": 1.5}, "page_size=1.5"),
        ({"sink": -1}, "sink=-1"),
        ({"window": 0}, "window=0"),
        ({"interval": -1}, "interval=-1"),
        ({"seed": -1}, "seed=-1"),
        ({"seed": 2**63}, "seed="),
        ({"rotation": "yes"}, "rotation='yes'"),
        ({"policy_options": [1]}, "policy_options"),
        ({"budgets": 0.5}, "unknown field 'budgets'. Did you mean 'budget'"),
        # What earlier versions had
        ({"threshold": "median"}, "unknown field 'threshold'"),
        ({"anchors": ["mean"]}, "unknown field 'anchors'. Did you mean 'anchor'"),
    ],
    ids=str,
)
def test_bad_values_name_the_argument(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        KVCrush(**fields)


def test_json_and_back() -> None:
    config = CrushConfig(
        budget="25%",
        policy="pyramidkv",
        policy_options={"steepness": 10},
        anchor="random",
        representative_share=0.1,
    )
    text = config.to_json()
    assert CrushConfig.from_json(text) == config
    assert json.loads(text)["anchor"] == "random"
    # One token and the whole cache stay apart.
    assert CrushConfig.from_json(CrushConfig(budget=1.0).to_json()).parsed_budget.kind == "fraction"


def test_replace_checks_again() -> None:
    assert CrushConfig().replace(budget=0.5).budget == 0.5
    with pytest.raises(ConfigError, match="budget"):
        CrushConfig().replace(budget=-1)


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "no JSON"), ("[1]", "JSON object"), ('{"polcy": "h2o"}', "Did you mean 'policy'"), ("\xff", "utf-8")],
)
def test_bad_files(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(content, encoding="latin-1")
    with pytest.raises(ConfigError, match=message):
        CrushConfig.load(path)
    with pytest.raises(ConfigError, match="missing"):
        CrushConfig.load(tmp_path / "missing.json")


def test_everything_is_frozen() -> None:
    with pytest.raises(AttributeError):
        CrushConfig().budget = 0.5  # type: ignore[misc]
    options = {"kernel": 5}
    config = CrushConfig(policy_options=options)
    options["kernel"] = 9
    assert config.policy_options["kernel"] == 5
    assert hash(config) == hash(CrushConfig(policy_options={"kernel": 5}))


def test_another_policy_does_not_take_over_options() -> None:
    config = CrushConfig(policy="snapkv", policy_options={"kernel": 5})
    assert config.replace(policy="h2o").policy_options == {}
    assert config.replace(policy="snapkv", budget=0.5).policy_options == {"kernel": 5}
    assert config.replace(policy="pyramidkv", policy_options={"kernel": 3}).policy_options == {"kernel": 3}
