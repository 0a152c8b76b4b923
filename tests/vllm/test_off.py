"""Without the option vLLM is what it is without the package; with a wrong one, it does not start."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from engines import engine, random_prompts
from transformers import DeepseekV3Config, MistralConfig, Qwen3Config
from vllm import LLM
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.worker.cpu_model_runner import CPUModelRunner

from crushkv import ConfigError, CrushConfig, UnsupportedModelError
from crushkv.vllm.settings import engine_config
from crushkv.vllm.support import check_engine, check_groups, check_signature

PROMPTS = random_prompts([200, 90, 330], seed=1)
WITHOUT = """
import json, sys
from pathlib import Path
sys.path.insert(0, {folder!r})
from engines import engine
from vllm.engine.arg_utils import EngineArgs
assert not hasattr(EngineArgs.create_engine_config, "crushkv")
with engine(Path({model!r}), None, skip_tokenizer_init=True) as e:
    print("TOKENS", json.dumps(e.generate({prompts!r}, 60)))
"""


def test_off_is_vllm_without_the_package(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CRUSHKV_VLLM", raising=False)
    code = WITHOUT.format(folder=str(Path(__file__).parent), model=str(small), prompts=PROMPTS)
    environment = {**os.environ, "VLLM_PLUGINS": "none"}
    output = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    tokens = [line for line in output.stdout.splitlines() if line.startswith("TOKENS ")]
    assert tokens, output.stderr[-3000:]
    with engine(small, None, skip_tokenizer_init=True) as e:
        assert type(e.scheduler) is Scheduler
        assert type(e.manager) is FullAttentionManager
        assert type(e.runner) is CPUModelRunner
        assert e.generate(PROMPTS, 60) == json.loads(tokens[0].removeprefix("TOKENS "))


def test_environment_variable(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CRUSHKV_VLLM", '{"budget": 64}')
    with engine(small, None, skip_tokenizer_init=True) as e:
        assert e.crush.config.budget == 64
        e.generate(PROMPTS, 4)
        assert e.crush.totals.tokens_dropped == (200 - 56) + (90 - 58) + (330 - 58)


def refused(model: Path, match: str, crush: Any = None, error: type[Exception] = UnsupportedModelError, **options: Any):
    additional = {"crushkv": {} if crush is None else crush}
    with pytest.raises(error, match=match):
        LLM(str(model), additional_config=additional, skip_tokenizer_init=True, max_model_len=256, **options)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (
            {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}},
            "speculative",
        ),
        ({"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}}, "KV connectors"),
        ({"pipeline_parallel_size": 2}, "pipeline_parallel_size=2"),
        ({"scheduler_cls": "vllm.v1.core.sched.scheduler.Scheduler"}, "scheduler_cls"),
        ({"enable_lora": True}, "LoRA"),
        ({"runner": "pooling", "convert": "embed"}, "pooling"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refused_options(small: Path, options: dict[str, Any], match: str) -> None:
    refused(small, match, **options)


def test_refused_runner(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # On a CPU, vLLM does not come as far as to choose the V2 runner.
    vllm_config = EngineArgs(str(small), skip_tokenizer_init=True, enforce_eager=True).create_engine_config()
    check_engine(vllm_config, CrushConfig())
    monkeypatch.setattr(VllmConfig, "use_v2_model_runner", True)
    with pytest.raises(UnsupportedModelError, match="VLLM_USE_V2_MODEL_RUNNER=0"):
        check_engine(vllm_config, CrushConfig())


def test_refused_version(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm.__version__", "0.33.1")
    refused(small, r"vLLM 0\.33\.1: this release of crushkv works with vLLM 0\.32\.x")


def test_refused_signature() -> None:
    with pytest.raises(UnsupportedModelError, match=r"Scheduler\.add_request takes \['request'\]"):
        check_signature(Scheduler.add_request, "request", "priority")


def test_refused_policy(small: Path) -> None:
    refused(small, "pyramidkv.*one block table", {"policy": "pyramidkv"})
    refused(small, "heads=.profile.*one block table", {"heads": "profile"})


def test_refused_formats(small: Path) -> None:
    refused(small, "bits=4, rank=None: vLLM's blocks", {"bits": 4})
    refused(small, "rank=8", {"rank": 8})


@pytest.mark.parametrize(
    ("crush", "match"),
    [
        ({"budgt": 0.5}, "unknown field 'budgt'"),
        ({"budget": 300}, "budget=300 tokens is above max_model_len=256"),
        ({"budget": 0}, "budget=0"),
        ("on", "accepted are an object"),
        ({"window": 5000}, "window=5000: accepted are fewer than max_model_len=256"),
        ({"sink": 256}, "sink=256"),
        ({"budget": "1B"}, "smaller than the .* bytes of sink . window"),
    ],
)
def test_refused_configuration(small: Path, crush: Any, match: str) -> None:
    refused(small, match, crush, ConfigError)


@pytest.mark.parametrize("additional", [{"CrushKV": {}}, {"crush_kv": True}, {"kvcrush": {}}, {"budget": 0.25}])
def test_refused_keys(small: Path, additional: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="crushkv"):
        LLM(str(small), additional_config=additional, skip_tokenizer_init=True, max_model_len=256)
    assert engine_config({"somebody_else": {"budget": 3}}) is None


SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 512,
}  # fmt: skip
MODELS = {
    "sliding-window": (MistralConfig(**SIZES, head_dim=32, sliding_window=64), "MistralForCausalLM"),
    "MLA": (
        DeepseekV3Config(
            **SIZES, kv_lora_rank=16, q_lora_rank=None, qk_rope_head_dim=16, qk_nope_head_dim=16, v_head_dim=16
        ),
        "DeepseekV3ForCausalLM",
    ),
    "hybrid": (
        Qwen3Config(
            **SIZES, head_dim=32, use_sliding_window=True, sliding_window=64, max_window_layers=1,
            layer_types=["full_attention", "sliding_attention"],
        ),
        "Qwen3ForCausalLM",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", MODELS)
def test_refused_models(tmp_path: Path, kind: str) -> None:
    config, architecture = MODELS[kind]
    config.architectures = [architecture]
    config.save_pretrained(tmp_path)
    refused(tmp_path, "sliding-window" if kind == "hybrid" else kind, load_format="dummy")


def test_refused_groups(small: Path) -> None:
    with engine(small, {}, skip_tokenizer_init=True) as e:
        groups = e.scheduler.kv_cache_config.kv_cache_groups
    check_groups(groups)
    with pytest.raises(UnsupportedModelError, match="2 groups"):
        check_groups(groups * 2)
