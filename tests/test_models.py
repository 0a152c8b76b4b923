"""Every architecture either works, by each of these measures, or is refused with the reason."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from architectures import prompts
from crushkv import ConfigError, CrushConfig, KVCrush, UnsupportedModelError, load_cache, plan_cache, save_cache
from crushkv.hf import CrushLayer
from model_page import PAGE, page
from model_zoo import TEXT, Model, build, small_config
from oracle import Recording, record, replay
from picture_models import PICTURES, build_picture_model, picture_prompts

GREEDY: dict[str, Any] = {"do_sample": False, "pad_token_id": 0}
# Small enough that a short prompt and a few decoded tokens evict again and again.
CHURN = CrushConfig(budget=24, sink=2, window=8, page_size=4, interval=4)
LENGTHS = [60, 41]
NEW = 6
# One of each kind; the others are slow by their number.
QUICK = {
    *("llama", "gpt2", "gemma3_text", "gemma3n_text", "gpt_oss", "qwen3_next", "deepseek_v3", "bloom", "falcon_h1"),
    *("qwen2_5_vl", "mllama"),
}


def lines(models: Iterable[str]) -> list[Any]:
    return [pytest.param(kind, marks=() if kind in QUICK else pytest.mark.slow) for kind in models]


@pytest.mark.parametrize("kind", lines(TEXT))
def test_model(kind: str) -> None:
    skip_where_missing(kind)
    if TEXT[kind].broken:
        with pytest.raises(Exception, match=TEXT[kind].broken):
            build(kind)
        return
    check(TEXT[kind], build(kind), prompts(LENGTHS))


@pytest.mark.parametrize("kind", lines(PICTURES))
def test_model_with_a_picture(kind: str) -> None:
    skip_where_missing(kind)
    model, inputs = build_picture_model(kind), picture_prompts(kind)
    if PICTURES[kind].expected.broken:
        with pytest.raises(Exception, match=PICTURES[kind].expected.broken):
            model(**inputs)
        return
    if PICTURES[kind].picture is not None:
        with torch.no_grad():
            seen = model(**inputs).logits[:, -1]
            other = model(**inputs | {name: flipped(tensor) for name, tensor in inputs.items()}).logits[:, -1]
        assert difference([seen], [other]) > 1e-3 * float(seen.abs().max()), "the picture makes no difference"
    if PICTURES[kind].within:
        check_within(model, inputs)
    else:
        check(PICTURES[kind].expected, model, inputs)


def skip_where_missing(kind: str) -> None:
    if kind not in CONFIG_MAPPING:
        pytest.skip(f"Transformers {transformers.__version__} has no {kind}")


def flipped(tensor: Tensor) -> Tensor:
    """Another picture: only pixels are no integers."""
    return -tensor if tensor.is_floating_point() else tensor


def test_every_model_of_transformers_is_here() -> None:
    """A new release brings new models: each needs a line in the zoo, with what is expected of it."""
    assert set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) <= set(TEXT) | set(PICTURES)


def test_the_page_says_what_is_tested_here() -> None:
    if f"Transformers {transformers.__version__}" not in PAGE.read_text(encoding="utf-8"):
        pytest.skip("docs/models.md was made with another release of Transformers, whose models are others")
    assert PAGE.read_text(encoding="utf-8") == page(), "python tests/model_page.py writes it anew"


def test_dory_that_shares_layers_between_its_passes_is_refused() -> None:
    skip_where_missing("dory")
    config = small_config("dory", TEXT["dory"].fields | {"recurrent_kv_cache_mode": "last_loop"})
    with pytest.raises(UnsupportedModelError, match="only 'per_loop' works"):
        KVCrush().cache(AutoModelForCausalLM.from_config(config).eval())


def check(expected: Model, model: Any, inputs: dict[str, Tensor]) -> None:
    if expected.refused:
        with pytest.raises(UnsupportedModelError, match=expected.refused):
            KVCrush().cache(model)
        return
    full = model.generate(**inputs, **GREEDY, max_new_tokens=NEW, output_logits=True, return_dict_in_generate=True)
    scale = max(float(logits.abs().max()) for logits in full.logits)
    equals_full_cache_at_budget_one(model, inputs, full, 3e-5 * scale)
    equals_masked_full_cache(model, inputs, 1e-4 * scale)
    shows_policies_the_weights_of_the_model(model, inputs)
    holds_few_bits(model, inputs, full, expected.few_bits, 0.2 * scale)
    model.config.get_text_config(decoder=True)._attn_implementation = "eager"
    equals_masked_full_cache(model, inputs, 1e-4 * scale, turns=1)


def check_within(model: Any, inputs: dict[str, Tensor]) -> None:
    """A model whose `generate` calls that of a text model within it."""
    full = model.generate(**inputs, **GREEDY, max_new_tokens=NEW, output_logits=True, return_dict_in_generate=True)
    scale = max(float(logits.abs().max()) for logits in full.logits)
    equals_full_cache_at_budget_one(model, inputs, full, 3e-5 * scale)
    with KVCrush(CHURN)(model) as session:
        model.generate(**inputs, **GREEDY, max_new_tokens=NEW)
    assert session.cache is not None
    assert all(layer.storage.length < layer.seen for layer in session.cache.crushed_layers)
    assert len(session.cache.crushed_layers) == len(session.cache.layers)


def compressible(model: Any, full: Any) -> list[int]:
    """Layers of a full cache that Transformers lets grow, and those with a window that no token is ever outside of."""
    config = model.config.get_text_config(decoder=True)
    wide = (getattr(config, "sliding_window", None) or 0) >= (getattr(config, "max_position_embeddings", None) or 512)
    growing = (DynamicLayer, DynamicSlidingWindowLayer) if wide else (DynamicLayer,)
    return [
        i
        for i, layer in enumerate(full.layers)
        if type(layer) in growing and i not in (getattr(config, "cross_attention_layers", None) or ())
    ]


def equals_full_cache_at_budget_one(model: Any, inputs: dict[str, Tensor], full: Any, tolerance: float) -> None:
    with KVCrush(budget=1.0)(model):
        ours = model.generate(**inputs, **GREEDY, max_new_tokens=NEW, output_logits=True, return_dict_in_generate=True)
    assert difference(ours.logits, full.logits) < tolerance, "budget 1.0"
    assert torch.equal(ours.sequences, full.sequences)


def equals_masked_full_cache(model: Any, inputs: dict[str, Tensor], tolerance: float, turns: int = 2) -> None:
    """Left padding, and evictions in each turn: of the prompt, and while decoding."""
    other = copy.deepcopy(model)  # dynamic RoPE remembers the longest text that it has seen
    recording = record(model, CHURN, inputs, turns=turns, max_new_tokens=6)
    assert difference(recording.logits, replay(other, recording)) < tolerance, "masked full cache"
    assert dropped(recording) == compressible(model, recording.full), "layers that dropped tokens"


def dropped(recording: Recording) -> list[int]:
    return [index for index, visible in recording.visible[-1].items() if not bool(visible.all())]


def shows_policies_the_weights_of_the_model(model: Any, inputs: dict[str, Tensor]) -> None:
    recording = record(model, CrushConfig(budget=1.0, policy="h2o"), inputs, max_new_tokens=1)
    replay(model, recording)
    real = inputs["attention_mask"].bool()
    for index, layer in enumerate(recording.cache.layers):
        if isinstance(layer, CrushLayer):
            mass = layer.groups[0].mass
            assert mass is not None
            weights = recording.weights[index] * real[:, None, :, None]
            assert difference([mass], [weights.sum(2)[..., : real.shape[1]]]) < 1e-4 * real.shape[1], f"mass {index}"
    full_bytes = sum(layer.storage.sizes().raw(layer.seen) for layer in recording.cache.crushed_layers)
    assert plan_cache(model.config, recording.cache.config, real.shape[1], raw_bytes=4).full_bytes == full_bytes


def holds_few_bits(model: Any, inputs: dict[str, Tensor], full: Any, refused: str, tolerance: float) -> None:
    config = CrushConfig(budget=1.0, bits=8, window=8, min_tokens=0)
    if refused:
        with pytest.raises(UnsupportedModelError, match=refused):
            KVCrush(config).cache(model)
        return
    with KVCrush(config)(model) as session:
        ours = model.generate(**inputs, **GREEDY, max_new_tokens=2, output_logits=True, return_dict_in_generate=True)
    assert difference(ours.logits, full.logits[:2]) < tolerance, "few bits"
    assert session.cache is not None
    assert all(layer.storage.blocked for layer in session.cache.crushed_layers)
    with KVCrush("small", budget=0.5, window=8, page_size=4, min_tokens=0)(model) as session:
        model.generate(**inputs, **GREEDY, max_new_tokens=1)
    for layer in session.cache.crushed_layers:
        full_bytes = layer.storage.rows * replace(layer.storage.sizes(), raw_bytes=2).raw(layer.seen)
        assert layer.storage.blocked and layer.storage.nbytes_at_16_bits < 0.7 * full_bytes


def difference(ours: Any, theirs: Any) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("kind", ["gemma3_text", "gemma3n_text", "qwen3_next", "lfm2", "nemotron_h", "deepseek_v3"])
def test_what_is_left_alone_is_saved_with_a_cache(kind: str, tmp_path: Path) -> None:
    check_that_a_loaded_cache_answers_alike(build(kind), KVCrush(CHURN), tmp_path)


def test_layers_that_share_keys_read_a_loaded_cache(tmp_path: Path) -> None:
    # The first pass over it is one token long: all layers need more than that and what is not packed.
    packed = KVCrush("small", budget=0.5, window=8, page_size=4, min_tokens=0)
    check_that_a_loaded_cache_answers_alike(build("gemma3n_text"), packed, tmp_path)


def check_that_a_loaded_cache_answers_alike(model: Any, method: KVCrush, tmp_path: Path) -> None:
    inputs = prompts([60])
    with method(model) as session:
        read = model.generate(**inputs, **GREEDY, max_new_tokens=2)
    save_cache(tmp_path / "cache", session.cache, model, read[:, :-1])
    answers = []
    for cache in (session.cache, load_cache(tmp_path / "cache", model).cache()):
        with torch.no_grad():
            answers.append(model.generate(read, past_key_values=cache, **GREEDY, max_new_tokens=12))
    assert torch.equal(*answers)


# Positions

LONG_FACTORS = {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
SCALED: dict[str, dict[str, Any]] = {
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "longrope": {"rope_type": "longrope", "factor": 4.0, "original_max_position_embeddings": 64, **LONG_FACTORS},
}


@pytest.mark.parametrize("rope", SCALED.values(), ids=SCALED)
def test_scaled_rope_reads_beyond_the_positions_of_the_configuration(rope: dict[str, Any]) -> None:
    config = small_config("llama", {"max_position_embeddings": 64, "rope_parameters": {"rope_theta": 1e4, **rope}})
    model = AutoModelForCausalLM.from_config(config).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        equals_masked_full_cache(model, prompts([120, 90]), 1e-3)
        KVCrush(budget=200, page_size=100).cache(model)


def test_plain_rope_reads_on_with_a_warning() -> None:
    model = AutoModelForCausalLM.from_config(small_config("llama", {"max_position_embeddings": 64})).eval()
    with pytest.warns(UserWarning, match="longer than the 64 positions that the model was made for"):
        equals_masked_full_cache(model, prompts([120, 90]), 1e-3)


def test_learned_positions_end() -> None:
    model = AutoModelForCausalLM.from_config(small_config("gpt2", {"n_positions": 64})).eval()
    with KVCrush()(model), pytest.raises(ConfigError, match="prompt: 80 tokens are more than the model's 64 positions"):
        model.generate(**prompts([80]), **GREEDY, max_new_tokens=2)
    with pytest.raises(ConfigError, match="budget=80 tokens is above the model's 64 positions"):
        KVCrush(budget=80).cache(model)
    with pytest.raises(ConfigError, match="page_size=80 tokens is above the model's 64 positions"):
        KVCrush(page_size=80).cache(model)


def test_a_window_beyond_the_positions_is_none() -> None:
    """Phi-3.5-mini and Phi-4-mini: twice as large as the positions, so that no token is ever outside of it."""
    config = small_config("phi3", {"max_position_embeddings": 64, "sliding_window": 128})
    model = AutoModelForCausalLM.from_config(config).eval()
    equals_masked_full_cache(model, prompts([60, 41]), 1e-3)
    with (
        KVCrush()(model),
        pytest.raises(ConfigError, match="prompt: 140 tokens are more than the model's 128 positions"),
    ):
        model.generate(**prompts([140]), **GREEDY, max_new_tokens=2)
