"""Caches as files: what is loaded goes on as what was saved, and what does not fit is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from architectures import ARCHITECTURES, prompts, small_model
from crushkv import CrushConfig, KVCrush, SavedCacheError, load_cache, save_cache
from crushkv.errors import ConfigError, CrushError
from crushkv.hf import CrushCache
from crushkv.tensor_file import _digest

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


SAVED = [("llama", name, lengths) for name in CONFIGURATIONS for lengths in ([120], [120, 77])] + [
    (other, name, [120, 77])
    for other in sorted(ARCHITECTURES)
    if other != "llama"
    for name in ("expected_attention", "4 and 3/2 bits", "h2o, 8 bits", "a quarter of the rank")
]


@pytest.mark.parametrize(("architecture", "name", "lengths"), SAVED)
def test_a_loaded_cache_goes_on_bit_for_bit(architecture: str, name: str, lengths: list[int], tmp_path: Path) -> None:
    model = small_model(architecture)
    cache, ids = filled(model, CrushConfig(**CONFIGURATIONS[name], **CHURN), lengths)
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


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_flipped_and_cut_bytes(file: Path, data: st.DataObject) -> None:
    """Whatever a file has become: it loads as what was written, or a clear error names it."""
    model = small_model()
    whole = file.read_bytes()
    damaged = bytearray(whole)
    header = 8 + int.from_bytes(whole[:8], "little")
    for _ in range(data.draw(st.integers(1, 4))):
        # Half of them in the header, which is small.
        place = data.draw(st.one_of(st.integers(0, header - 1), st.integers(0, len(whole) - 1)))
        damaged[place] ^= data.draw(st.integers(1, 255))
    file.write_bytes(damaged[: data.draw(st.one_of(st.just(len(whole)), st.integers(0, len(whole))))])
    saved, said = None, ""
    try:
        saved = load_cache(file, model)
    except SavedCacheError as error:
        said = str(error)
    file.write_bytes(whole)
    if saved is None:
        assert str(file) in said
    else:
        same = load_cache(file, model)
        assert torch.equal(saved.input_ids, same.input_ids) and saved.config == same.config


def forged(path: Path, change: Callable[[dict[str, torch.Tensor], dict[str, Any]], None]) -> Path:
    """A file with other contents, whose digest says that they are what was written."""
    with safe_open(path, framework="pt") as opened:
        metadata = opened.metadata()
    del metadata["digest"]
    tensors = load_file(path)
    parsed = {name: json.loads(metadata[name]) for name in ("layers", "config")}
    change(tensors, parsed)
    metadata |= {name: json.dumps(value) for name, value in parsed.items()}
    metadata["digest"] = _digest(tensors, metadata)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)
    return path


def moved(tensors: dict[str, torch.Tensor], slot: int, position: int) -> None:
    tensors["1.positions"][0, 0, slot] = position


FORGERIES: dict[str, Callable[[dict[str, torch.Tensor], dict[str, Any]], Any]] = {
    "no keys": lambda t, m: t.pop("0.keys"),
    "no values": lambda t, m: t.pop("2.values"),
    "no tiers": lambda t, m: t.pop("1.tiers"),
    "no input_ids": lambda t, m: t.pop("input_ids"),
    "too far": lambda t, m: moved(t, -1, 124),
    "negative": lambda t, m: moved(t, 5, -1),
    "huge": lambda t, m: moved(t, 5, 2**30),
    "twice": lambda t, m: moved(t, 5, int(t["1.positions"][0, 0, 4])),
    "not ascending": lambda t, m: t.update({"1.positions": t["1.positions"].flip(-1)}),
    "no such tier": lambda t, m: t.update({"1.tiers": t["1.tiers"] + 3}),
    "narrow": lambda t, m: t.update({"0.keys": t["0.keys"][..., :8]}),
    "short": lambda t, m: t.update({"0.values": t["0.values"][:, :, :-3]}),
    "other heads": lambda t, m: t.update({"0.keys": t["0.keys"][:, :1], "0.values": t["0.values"][:, :1]}),
    "two rows": lambda t, m: t.update({"0.keys": t["0.keys"].repeat(2, 1, 1, 1)}),
    "other queries": lambda t, m: t.update({"0.queries": t["0.queries"][:, :3]}),
    "integers": lambda t, m: t.update({"0.keys": t["0.keys"].int()}),
    "fewer tokens": lambda t, m: t.update({"input_ids": t["input_ids"][:, 1:]}),
    "tokens of floats": lambda t, m: t.update({"input_ids": t["input_ids"].float()}),
    "many evicted": lambda t, m: t.update({"0.evicted": t["0.evicted"] + 1000}),
    "a layer more": lambda t, m: m["layers"].append(m["layers"][0]),
    "a layer less": lambda t, m: m["layers"].pop(),
    "no counts": lambda t, m: m["layers"][0].clear(),
    "text": lambda t, m: m["layers"][0].update(seen="many"),
    "another length": lambda t, m: m["layers"][0].update(seen=7),
    "layers are a number": lambda t, m: m.update(layers=3),
    "foreign": lambda t, m: t.update({"9.keys": t["0.keys"].clone()}),
    "no layer": lambda t, m: t.update({"x.keys": t["0.keys"].clone()}),
}


@pytest.mark.parametrize("forgery", FORGERIES.values(), ids=FORGERIES)
def test_contents_that_no_cache_has(file: Path, forgery: Callable[[Any, Any], Any]) -> None:
    with pytest.raises(SavedCacheError, match="damaged") as caught:
        load_cache(forged(file, forgery), small_model())
    assert str(file) in str(caught.value)


def test_what_is_no_cache_is_described(tmp_path: Path) -> None:
    for name, data, looks in (
        ("a.txt", b"The harbour's report. " * 20, "looks like text"),
        ("a.pdf", b"%PDF-1.7 " + bytes(range(256)), "PDF"),
        ("a.bin", bytes(range(256)) * 4, "binary data"),
        ("a", b"", "an empty file"),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(SavedCacheError, match=f"expected a file that .crushkv build.*{looks}"):
            load_cache(tmp_path / name, small_model())


def test_weights_that_are_elsewhere(tmp_path: Path) -> None:
    """accelerate keeps them, and the model has them on the meta device."""
    accelerate = pytest.importorskip("accelerate")
    model = small_model("gemma3")
    cache, ids = filled(model, CrushConfig(**CHURN, bits=8), [120])
    save_cache(tmp_path / "a.safetensors", cache, model, ids)
    expected = go_on(model, cache)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    loaded = load_cache(tmp_path / "a.safetensors", model)
    save_cache(tmp_path / "b.safetensors", loaded.cache(), model, ids)
    before, after = (load_file(tmp_path / f"{name}.safetensors") for name in "ab")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(go_on(model, loaded.cache()), expected)
    with pytest.raises(ConfigError, match="meta device"):
        load_cache(tmp_path / "a.safetensors", small_model("gemma3").to("meta"))


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
    assert first["prompt_tokens"] > 450
    # Whatever was asked before, an answer is the same.
    alone = json.loads(crushkv("ask", cache, questions[1], "--max-new-tokens", 24, "--json").stdout)
    assert alone["answers"][0]["answer"] == second["answer"]
    whole = cache.stat().st_size
    crushkv("build", tmp_path / "report.txt", "--budget", "25%", "-o", cache)
    assert cache.stat().st_size < 0.8 * whole  # the last queries, which later evictions need, do not shrink
    assert json.loads(crushkv("ask", cache, questions[0], "--json").stdout)["config"]["budget"] == "25%"
    crushkv("ask", tmp_path / "report.txt", "Who?", code=1)
    crushkv("build", tmp_path / "report.txt", "-o", tmp_path / "none" / "x", code=2)
