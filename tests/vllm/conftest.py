"""Fixtures of the tests that need vLLM. `make test-vllm` runs them, in an environment of their own."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

# Before vLLM is imported: engines live in this process, and nothing is asked of a network.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from engines import Reference, small_model

from crushkv.embedded import embedded_model_path

LONGEST = ("test_server", "test_scale_out", "test_parity")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files come first: two run at a time, and the last one would run alone."""
    items.sort(key=lambda item: [item.path.stem == name for name in LONGEST], reverse=True)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--soak-seconds", type=float, default=15, help="how long each soak test keeps an engine busy")


@pytest.fixture(scope="session")
def smollm() -> Path:
    """The embedded model."""
    return embedded_model_path()


@pytest.fixture(scope="session")
def smollm_reference(smollm: Path) -> Reference:
    return Reference(smollm)


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The random-weight model."""
    return small_model(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="session")
def small_with_text(smollm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with the embedded model's tokenizer, for servers."""
    folder = small_model(tmp_path_factory.mktemp("small-with-text"), vocabulary=49152)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(smollm / name, folder)
    return folder


@pytest.fixture(scope="session")
def small_reference(small: Path) -> Reference:
    return Reference(small)
