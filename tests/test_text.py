"""Whatever text comes in: within a fifth of a second there is a valid object, or an error that says what is wrong."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from crushkv import ConfigError, CrushConfig
from crushkv.budget import Budget
from crushkv.config_text import expand, parse_config
from crushkv.vllm.settings import engine_config, request_config

SECONDS = 0.2
LONGEST_MESSAGE = 4000
HUGE: list[Any] = [
    "1e1000000000",
    "1e-1000000000",
    "0." + "1" * 5000,
    "9" * 5000,
    "9" * 5000 + "GiB",
    "1/" + "3" * 5000,
    "1e999%",
    "5e-324",
    "0.1234567890123456789012345",
    "99999999999999999999GiB",
    "٣",
    "\0",
    " " * 100000 + "0.5",
    10**5000,
    -(10**5000),
    2**63,
    2**64,
    1e308,
    5e-324,
    float("nan"),
]
# Characters that numbers, units and JSON are made of, so that much of what is drawn comes near to being valid.
NUMBER_LIKE = st.text(alphabet="0123456789.eE+-%/ KMGiBb_naifx", max_size=40)
HUGE_TEXTS = [value for value in HUGE if not isinstance(value, int)]  # hypothesis cannot print such integers
SCALARS = st.one_of(
    st.sampled_from(HUGE_TEXTS),
    NUMBER_LIKE,
    st.text(max_size=30),
    st.integers(),
    st.floats(),
    st.booleans(),
    st.none(),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
FIELDS = st.sampled_from([*CrushConfig().to_dict(), "budgt", "", "kernel", "x" * 10000])
fuzz = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def in_time(make: Callable[[], Any]) -> Any:
    """What `make` returns, None where it refuses; anything but a `ConfigError` goes through."""
    made, message, seconds = None, "made", []
    for _ in range(3):  # a garbage collection may fall into one of them
        start = time.process_time()
        try:
            made = make()
        except ConfigError as error:
            message = str(error)
        seconds.append(time.process_time() - start)
        if seconds[-1] < SECONDS:
            break
    assert min(seconds) < SECONDS
    assert 0 < len(message) < LONGEST_MESSAGE
    return made


def usable(budget: Budget) -> None:
    """Its tokens are in range, and exact."""
    seen = torch.tensor([1, 1000, 131072, 10**7])
    tokens = budget.tokens(seen, bytes_per_token=4096)
    for count, kept in zip(seen.tolist(), tokens.tolist(), strict=True):
        assert 0 <= kept <= count
        if budget.kind == "fraction":
            assert kept == int(count * budget.amount)


@fuzz
@given(st.one_of(SCALARS, VALUES))
def test_budgets(value: Any) -> None:
    budget = in_time(lambda: Budget.parse(value))
    if budget is not None:
        usable(budget)


@pytest.mark.parametrize("value", HUGE, ids=lambda value: str(type(value).__name__))
def test_huge_budgets(value: Any) -> None:
    budget = in_time(lambda: Budget.parse(value))
    if budget is not None:
        usable(budget)
    in_time(lambda: request_config(CrushConfig(), {"crushkv": value}))


def test_fractions_of_many_digits_do_not_overflow() -> None:
    """Seventeen digits times a thousand tokens are more than 64 bits hold."""
    assert Budget.parse(0.12345678901234567).tokens(torch.tensor([100_000]), 1).item() == 12345
    assert Budget.parse("0.123456789012345678901").tokens(torch.tensor([100_000]), 1).item() == 12345


@fuzz
@given(st.dictionaries(FIELDS, VALUES, max_size=3))
def test_dictionaries(values: dict[str, Any]) -> None:
    config = in_time(lambda: CrushConfig.from_dict(values))
    if config is not None:
        assert CrushConfig.from_json(config.to_json()) == config
        usable(config.parsed_budget)


@fuzz
@given(st.one_of(st.text(max_size=200), st.text(alphabet='{}[]",:0123456789.e-budgetsink ', max_size=60)))
@example("[" * 100000)
@example('{"budget": ' + "9" * 5000 + "}")
@example('{"budget": ' * 20000)
@example('{"seed": 1e400}')
@example('{"policy_options": {"kernel": ' + "9" * 4000 + "}}")
def test_json(text: str) -> None:
    in_time(lambda: CrushConfig.from_json(text))


@fuzz
@given(
    st.sampled_from(["snapkv", "small", "h2o", "full", "readahead", "x"]),
    st.lists(st.tuples(FIELDS, st.one_of(NUMBER_LIKE, st.text(max_size=20))), max_size=3),
)
@example("snapkv", [("kernel", "[" * 4000)])
@example("snapkv", [("kernel", "9" * 4500)])
@example("snapkv", [("kernel", str(10**12 + 1))])
@example("snapkv", [("bits", "9" * 4500)])
@example("snapkv", [("budget", "1e1000000000")])
@example("x" * 100000, [])
def test_configuration_strings(name: str, fields: list[tuple[str, str]]) -> None:
    text = f"{name}:" + ",".join(f"{field}={value}" for field, value in fields)
    in_time(lambda: parse_config(text))
    in_time(lambda: expand(text))


def test_braces_are_bounded() -> None:
    assert len(expand("{h2o,snapkv}:budget={0.5,0.25}")) == 4
    with pytest.raises(ConfigError, match="accepted are 1000"):
        expand("{a,b}" * 500)


@fuzz
@given(st.dictionaries(st.sampled_from(["crushkv", "other"]), VALUES, max_size=2))
def test_what_vllm_is_given(values: dict[str, Any]) -> None:
    in_time(lambda: engine_config(values))
    in_time(lambda: request_config(CrushConfig(), values))


def test_files(tmp_path: Path) -> None:
    for name, content in {
        "deep": b"[" * 10**6,
        "long": b" " * 10**7,
        "binary": b"\xff\xfe\0",
        "number": b"9" * 5000,
    }.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ConfigError, match=name):
            CrushConfig.load(tmp_path / name)
    for path in ("\0", "x" * 5000, str(tmp_path)):
        with pytest.raises(ConfigError):
            CrushConfig.load(path)
