"""Caches as files: what is loaded goes on as what was saved, and what does not fit is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from architectures import ARCHITECTURES, prompts, small_model
from crushkv import CrushConfig, KVCrush, SavedCacheError, load_cache, save_cache
from crushkv.errors import ConfigError, CrushError
from crushkv.hf import CrushCache

CHURN: dict[str, Any] = {"min_tokens": 0, "budget": 0.4, "sink": 2, "window": 8, "page_size": 4, "interval": 8}
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "h2o": {"policy": "h2o", "representative_share": 0.25},
    "snapkv": {},
    "expected_attention": {"policy": "expected_attention"},
    "key_diff": {"policy": "key_diff"},
    "4 and 3/2 bits": {"bits": 4, "representative_bits": "3/2", "representative_share": 0.25},
    "h2o, 8 bits": {"policy": "h2o", "bits": 8},
    "a quarter of the rank": {"rank": 4},
    "most of the energy, 4 bits": {"rank": 0.8, "bits": 4},
}


def filled(model: Any, config: CrushConfig, lengths: list[int], new: int = 5) -> tuple[CrushCache, torch.Tensor]:
    """A cache after a prompt and a few decoded tokens, and the tokens that it has seen."""
    cache = KVCrush(config).cache(model)
    batch = prompts(lengths)
    tokens = model.generate(**batch, past_key_values=cache, do_sample=False, max_new_tokens=new, pad_token_id=0)
    return cache, tokens[:, : cache.get_seq_length()]


def go_on(model: Any, cache: CrushCache, steps: int = 20) -> torch.Tensor:
    """Logits of the tokens that follow, greedily; evictions included."""
    rows = cache.crushed_layers[0].batch_size
    tokens, logits = torch.full((rows, 1), 7), []
    for _ in range(steps):
        with torch.no_grad():
            logits.append(model(input_ids=tokens, past_key_values=cache).logits[:, -1])
        tokens = logits[-1].argmax(-1, keepdim=True)
    return torch.stack(logits)


@pytest.mark.parametrize("lengths", [[120], [120, 77]], ids=["one", "padded"])
@pytest.mark.parametrize("fields", CONFIGURATIONS.values(), ids=CONFIGURATIONS)
@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_a_loaded_cache_goes_on_bit_for_bit(
    architecture: str, fields: dict[str, Any], lengths: list[int], tmp_path: Path
) -> None:
    model = small_model(architecture)
    cache, ids = filled(model, CrushConfig(**fields, **CHURN), lengths)
    save_cache(tmp_path / "a.safetensors", cache, model, ids, {"title": "é"})
    saved = load_cache(tmp_path / "a.safetensors", model)
    assert saved.config == cache.config and torch.equal(saved.input_ids, ids) and saved.notes == {"title": "é"}
    first, second = saved.cache(), saved.cache()
    assert first.nbytes <= cache.nbytes  # without the room to grow
    assert first.report().tiers == cache.report().tiers
    expected = go_on(model, cache)
    assert torch.equal(go_on(model, first), expected)
    assert torch.equal(go_on(model, second), expected), "each cache is on its own"


def test_a_loaded_cache_serves_generate(tmp_path: Path) -> None:
    model = small_model()
    config = CrushConfig(**CHURN)
    cache, ids = filled(model, config, [120], new=1)
    save_cache(tmp_path / "a.safetensors", cache, model, ids)
    question = torch.cat([ids, torch.tensor([[5, 9, 11]])], dim=1)
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 20, "pad_token_id": 0}
    expected = model.generate(question, past_key_values=cache, **options)
    loaded = load_cache(tmp_path / "a.safetensors", model).cache()
    assert torch.equal(model.generate(question, past_key_values=loaded, **options), expected)


def test_a_cache_of_most_of_the_positions_is_loaded(tmp_path: Path) -> None:
    model = small_model()
    cache, ids = filled(model, CrushConfig(budget=1.0), [400])  # of 512
    save_cache(tmp_path / "a.safetensors", cache, model, ids)
    loaded = load_cache(tmp_path / "a.safetensors", model).cache()
    assert torch.equal(go_on(model, loaded), go_on(model, cache))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    model = small_model()
    cache, ids = filled(model, CrushConfig(**CHURN), [120])
    save_cache(tmp_path / "a.safetensors", cache, model, ids)
    return tmp_path / "a.safetensors"


def rewritten(path: Path, **metadata: str) -> Path:
    """The same file with other metadata."""
    with safe_open(path, framework="pt") as opened:
        before = opened.metadata()
    save_file(load_file(path), path, {**before, **metadata})
    return path


def test_what_does_not_fit_is_refused(file: Path, tmp_path: Path) -> None:
    model = small_model()
    load_cache(file, model)
    torch.manual_seed(1)
    other = type(model)(model.config).eval()
    for wrong in (other, small_model("qwen2"), small_model(dtype=torch.bfloat16)):
        with pytest.raises(SavedCacheError, match="another model"):
            load_cache(file, wrong)
    stretched = small_model()
    stretched.config.rope_parameters = {**stretched.config.rope_parameters, "rope_theta": 1e6}
    with pytest.raises(SavedCacheError, match="another model"):
        load_cache(file, stretched)
    with pytest.raises(SavedCacheError, match="No such file"):
        load_cache(tmp_path / "none.safetensors", model)
    save_file({"x": torch.ones(2)}, tmp_path / "foreign.safetensors")
    with pytest.raises(SavedCacheError, match="no cache of crushkv"):
        load_cache(tmp_path / "foreign.safetensors", model)
    with pytest.raises(SavedCacheError, match="in format 0.*build it again"):
        load_cache(rewritten(file, format_version="0"), model)


def test_damage_is_found(file: Path) -> None:
    model, whole = small_model(), file.read_bytes()
    for length in (0, 4, 100, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:length])
        with pytest.raises(SavedCacheError):
            load_cache(file, model)
    for place in (len(whole) - 1, len(whole) * 2 // 3):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(SavedCacheError, match="damaged"):
            load_cache(file, model)
    file.write_bytes(whole)
    for metadata in ({"layers": "["}, {"config": "{}x"}, {"digest": ""}):
        file.write_bytes(whole)
        with pytest.raises(SavedCacheError, match="damaged"):
            load_cache(rewritten(file, **metadata), model)


def test_only_a_filled_cache_with_its_tokens_is_saved(tmp_path: Path) -> None:
    model = small_model()
    cache, ids = filled(model, CrushConfig(**CHURN), [60])
    with pytest.raises(ConfigError, match="has seen"):
        save_cache(tmp_path / "a", cache, model, ids[:, 1:])
    with pytest.raises(ConfigError, match="has seen 0"):
        save_cache(tmp_path / "a", KVCrush(**CHURN).cache(model), model, ids)
    with pytest.raises(CrushError, match="No such file"):
        save_cache(tmp_path / "none" / "a", cache, model, ids)
    assert not list(tmp_path.iterdir())


# On the command line

DOCUMENT = (
    "The harbour's report. On Monday the barge Helena brought 42 tons of gravel. On Tuesday nothing came. The secret "
    "number for the amber door is 4821973. On Wednesday the ferry was late because of fog."
)


def crushkv(*args: object, code: int = 0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "crushkv", *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == code, done.stderr
    return done


@pytest.mark.model
def test_a_document_is_read_once_and_asked_later(tmp_path: Path) -> None:
    filler = (Path(__file__).parents[1] / "src/crushkv/demo/document.txt").read_text(encoding="utf-8")
    (tmp_path / "report.txt").write_text(f"{DOCUMENT}\n\n{filler[:2000]}", encoding="utf-8")
    cache = tmp_path / "report.safetensors"
    crushkv("build", tmp_path / "report.txt", "-o", cache)
    with safe_open(cache, framework="pt") as opened:
        config = CrushConfig.from_json(opened.metadata()["config"])
    assert (config.policy, config.budget, config.bits) == ("expected_attention", 1.0, 8)
    questions = ["What is the secret number for the amber door?", "What did the barge Helena bring?"]
    result = json.loads(crushkv("ask", cache, *questions, "--max-new-tokens", 24, "--json").stdout)
    first, second = result["answers"]
    assert "4821973" in first["answer"] and "gravel" in second["answer"]
    assert first["prompt_tokens"] > 450 and first["ttft"] < 2
    # Whatever was asked before, an answer is the same.
    alone = json.loads(crushkv("ask", cache, questions[1], "--max-new-tokens", 24, "--json").stdout)
    assert alone["answers"][0]["answer"] == second["answer"]
    whole = cache.stat().st_size
    crushkv("build", tmp_path / "report.txt", "--budget", "25%", "-o", cache)
    assert cache.stat().st_size < 0.8 * whole  # the last queries, which later evictions need, do not shrink
    assert json.loads(crushkv("ask", cache, questions[0], "--json").stdout)["config"]["budget"] == "25%"
    crushkv("ask", tmp_path / "report.txt", "Who?", code=1)
    crushkv("build", tmp_path / "report.txt", "-o", tmp_path / "none" / "x", code=2)
