"""Profiles: what is measured, that a file is whole and of this model, and where it is found."""

from __future__ import annotations

import json
import random
import shutil
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, PreTrainedTokenizerFast
from transformers.cache_utils import DynamicLayer

from architectures import ARCHITECTURES, VOCAB, small_model
from crushkv import CrushError, KVCrush, Profile, ProfileError, UnsupportedModelError, profile_model
from crushkv.core.heads import curve
from crushkv.evaluation.recording import Recording
from crushkv.files import cache_folder
from crushkv.fingerprint import digest_of, fingerprint
from crushkv.hf import find_profile, obtain_profile
from crushkv.hf.energies import SINK, UNSETTLED
from crushkv.hf.profiling import FILE, REPEAT, TEXTS, kept_profile
from crushkv.hf.rope import find_ropes
from crushkv.hf.support import cache_layers


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's cache folder, an empty one."""
    monkeypatch.setenv("CRUSHKV_CACHE", str(tmp_path / "cache"))
    assert cache_folder() == tmp_path / "cache"
    return tmp_path / "cache"


def letters() -> PreTrainedTokenizerFast:
    """A token for each character of ASCII."""
    backend = Tokenizer(models.WordLevel({chr(code): code for code in range(VOCAB)}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="?")


def text(name: str) -> str:
    return files("crushkv").joinpath("texts", f"{name}.txt").read_text(encoding="utf-8")


def saved_model(folder: Path, tokenizer: bool = True) -> Any:
    """A small model out of a folder of its own."""
    small_model().save_pretrained(folder)
    if tokenizer:
        letters().save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder)


@pytest.fixture(scope="module")
def llama() -> tuple[Any, Profile]:
    model = small_model()
    return model, profile_model(model, letters())


# What is measured


def plain_needs(model: Any, again: int) -> Tensor:
    """By the model's own eager attention weights: the greatest of each token, one head and text at a time."""
    eager = type(model)(model.config)
    eager.load_state_dict(model.state_dict())
    eager.eval().set_attn_implementation("eager")
    kinds = [type(kind) is DynamicLayer for kind in cache_layers(model.config)]
    between = letters()(REPEAT, return_tensors="pt").input_ids[0]
    scores = []
    for name in TEXTS:
        ids = letters()(text(name), return_tensors="pt").input_ids[0][: 512 - len(between) - again]
        with torch.no_grad():
            output = eager(input_ids=torch.cat([ids, between, ids[:again]])[None], output_attentions=True)
        weights = [x[0] for x, kind in zip(output.attentions, kinds, strict=True) if kind]
        kv_heads = getattr(model.config, "num_key_value_heads", None)
        of_text = torch.stack([x[:, -again:, :again].amax(1).unflatten(0, (kv_heads, -1)).amax(1) for x in weights])
        scores.append(of_text[..., SINK:])
    return curve(torch.cat(scores, dim=-1))


def plain(model: Any, tokens: int) -> tuple[Tensor, Tensor]:
    """Energies as their definition has them, one head and one channel at a time."""
    ropes = find_ropes(model)
    kinds = [type(kind) is DynamicLayer for kind in cache_layers(model.config)]
    keys_of, queries_of = [], []
    for name in TEXTS:
        recording = Recording(model, letters()(text(name), return_tensors="pt").input_ids[:, :tokens])
        layers = [layer for layer, kind in zip(recording._source.layers, kinds, strict=True) if kind]
        for rope, layer in zip(ropes, layers, strict=True):
            assert rope is not None
            keys, queries = rope.unturned(layer.keys[0], torch.arange(tokens)), layer.call.queries[0]
            kv_heads, group = len(keys), len(queries) // len(keys)
            for energy, x in (
                (keys_of, [keys[h, SINK:] - keys[h, SINK:].mean(0) for h in range(kv_heads)]),
                (queries_of, [queries[h * group : (h + 1) * group, UNSETTLED:].flatten(0, 1) for h in range(kv_heads)]),
            ):
                for head in x:
                    squares = head.pow(2).mean(0)
                    pairs = [squares[[c, int(rope.partner[c])]].mean() for c in range(len(squares))]
                    energy.append(torch.stack(pairs))
    shape = (len(TEXTS), len(ropes), -1, keys.shape[-1])
    return tuple(torch.stack(energies).reshape(shape).mean(0) for energies in (keys_of, queries_of))  # type: ignore


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_energies_are_those_of_the_models_keys_and_queries(architecture: str) -> None:
    model = small_model(architecture)
    lines: list[str] = []
    profile = profile_model(model, letters(), lines.append)
    between = len(letters()(REPEAT).input_ids)
    again = (512 - between) // 2
    keys, queries = plain(model, 512 - between - again)
    assert torch.allclose(profile.needs, plain_needs(model, again), rtol=1e-3, atol=1e-6)
    assert torch.allclose(profile.keys, keys, rtol=1e-4) and torch.allclose(profile.queries, queries, rtol=1e-4)
    assert profile.texts == TEXTS and len(lines) == len(TEXTS) and "left" in lines[-1]
    rope = find_ropes(model)[0]
    assert rope is not None and torch.equal(profile.keys[0], profile.keys[0][:, rope.partner])
    profile.check(model)


def test_without_rope_each_channel_has_its_own() -> None:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=VOCAB, n_positions=512, n_embd=64, n_layer=2, n_head=4, bos_token_id=1)
    profile = profile_model(AutoModelForCausalLM.from_config(config).eval(), letters())
    assert profile.keys.shape == (2, 4, 16) and len(profile.keys.unique()) > 100


def test_an_open_block_and_the_model_are_left_as_they_were(llama: tuple[Any, Profile]) -> None:
    model, _ = llama
    expected = profile_model(model, letters())  # on one thread, as below; the fixture's threads add in another order
    with KVCrush(budget=0.5, sink=2, window=4)(model) as session:
        model(input_ids=torch.arange(2, 60)[None])
        held = session.cache
        profile = profile_model(model, letters())
        assert session.cache is held and held is not None and held.get_seq_length() == 58
    assert all(torch.equal(getattr(profile, name), getattr(expected, name)) for name in ("keys", "queries", "needs"))


def test_too_few_positions_are_refused() -> None:
    config = ARCHITECTURES["llama"]()
    config.max_position_embeddings = 64
    with pytest.raises(UnsupportedModelError, match="64 positions"):
        profile_model(AutoModelForCausalLM.from_config(config), letters())


def test_the_texts_are_long_enough() -> None:
    assert all(4000 < len(text(name)) < 8000 for name in TEXTS)
    assert "Apache" in files("crushkv").joinpath("texts", "SOURCES.md").read_text(encoding="utf-8")


# Whose it is


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_weights_in_another_dtype_are_the_same_model(llama: tuple[Any, Profile], dtype: torch.dtype) -> None:
    llama[1].check(small_model(dtype=dtype))
    cast = small_model().to(dtype)
    llama[1].check(cast)
    assert fingerprint(cast) != fingerprint(small_model())


def test_another_model_is_refused(llama: tuple[Any, Profile], tmp_path: Path) -> None:
    _, profile = llama
    torch.manual_seed(1)
    other = AutoModelForCausalLM.from_config(ARCHITECTURES["llama"]())
    tuned = small_model()
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter += 0.02 * parameter.std() * torch.randn_like(parameter)
    stretched = small_model()
    stretched.config.rope_parameters = {**stretched.config.rope_parameters, "rope_theta": 1e6}
    saved = profile.save(tmp_path / "a.safetensors")
    for model in (other, tuned, stretched, small_model("qwen2")):
        with pytest.raises(ProfileError, match="a.safetensors: .*another model \\(llama\\)"):
            saved.check(model)


def test_offloaded_weights_are_the_same_model(llama: tuple[Any, Profile], tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    exact = fingerprint(small_model())
    in_memory, on_disk = small_model(), small_model()
    accelerate.cpu_offload(in_memory, execution_device="cpu")
    accelerate.disk_offload(on_disk, str(tmp_path / "weights"), execution_device="cpu")
    for model in (in_memory, on_disk):
        assert any(parameter.is_meta for parameter in model.parameters())
        llama[1].check(model)
        assert fingerprint(model) == exact
    profile = profile_model(in_memory, letters())
    assert torch.allclose(profile.keys, llama[1].keys, rtol=1e-5)


# Files


def test_a_file_has_all_of_it(llama: tuple[Any, Profile], tmp_path: Path) -> None:
    saved = llama[1].save(tmp_path / "a.safetensors")
    loaded = Profile.load(tmp_path / "a.safetensors")
    assert all(torch.equal(getattr(loaded, name), getattr(saved, name)) for name in ("keys", "queries", "needs"))
    assert (loaded.model, loaded.texts, loaded.model_type) == (saved.model, TEXTS, "llama")
    assert loaded.path == saved.path == tmp_path / "a.safetensors"
    loaded.check(llama[0])


def test_no_changed_or_missing_byte_goes_unnoticed(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    energies, needs = torch.rand(1, 2, 4), torch.ones(1, 2, 8)
    Profile(energies, energies.clone(), needs, "0123456789abcdef", "llama", TEXTS).save(path)
    whole, chance = path.read_bytes(), random.Random(0)
    for place in range(len(whole)):
        changed = bytearray(whole)
        changed[place] ^= 1 << chance.randrange(8)
        path.write_bytes(changed)
        with pytest.raises(ProfileError, match="a.safetensors: "):
            Profile.load(path)
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(ProfileError, match="a.safetensors: "):
            Profile.load(path)
    path.write_bytes(whole + b"\0")
    with pytest.raises(ProfileError, match="a.safetensors: "):
        Profile.load(path)


def forged(path: Path, tensors: dict[str, Tensor] | None = None, **metadata: str) -> Path:
    """The same file with other contents, and a digest that fits."""
    with safe_open(path, framework="pt") as opened:
        before = opened.metadata()
    del before["digest"]
    tensors, metadata = load_file(path) if tensors is None else tensors, {**before, **metadata}
    save_file(tensors, path, metadata | {"digest": digest_of(tensors, json.dumps(metadata, sort_keys=True))})
    return path


def test_what_is_no_profile_is_refused(llama: tuple[Any, Profile], tmp_path: Path) -> None:
    profile, path = llama[1], tmp_path / "a.safetensors"
    keys, queries = profile.keys, profile.queries
    wrong = keys.clone()
    wrong[0, 0, 0] = float("nan")
    cases: list[tuple[dict[str, Tensor] | None, dict[str, str], str]] = [
        (None, {"format": "crushkv cache"}, "no profile of crushkv"),
        (None, {"format_version": "0"}, "in format 0.*make it again"),
        (None, {"texts": "["}, "damaged"),
        ({"keys": keys}, {}, "damaged"),
        ({"keys": wrong, "queries": queries}, {}, "keys has numbers that are negative or not finite"),
        ({"keys": keys, "queries": -queries}, {}, "queries has numbers that are negative"),
        ({"keys": keys[:1].clone(), "queries": queries}, {}, "different shapes"),
        ({"keys": keys[0].clone(), "queries": queries[0].clone()}, {}, "expected float32"),
        ({"keys": keys.half(), "queries": queries.half()}, {}, "expected float32"),
        ({"keys": keys[:0].clone(), "queries": queries[:0].clone()}, {}, "expected float32"),
        ({"needs": -profile.needs}, {}, "needs has numbers that are negative"),
        ({"needs": profile.needs[:, :1].clone()}, {}, "needs is of"),
        ({"needs": profile.needs.flip(-1)}, {}, "needs does not descend"),
    ]
    whole = {"keys": keys, "queries": queries, "needs": profile.needs}
    for tensors, metadata, message in cases:
        if tensors is not None and message != "damaged":
            tensors = whole | tensors
        profile.save(path)
        Profile.load(forged(path))
        with pytest.raises(ProfileError, match=f"a.safetensors: .*{message}"):
            Profile.load(forged(path, tensors, **metadata))
    save_file({"x": torch.ones(2)}, path)
    for other in (path, tmp_path, tmp_path / "none"):
        with pytest.raises(ProfileError, match=str(other)):
            Profile.load(other)


# Where it is found


def test_the_given_one_comes_first_then_the_models_then_the_users(tmp_path: Path, cache: Path) -> None:
    model = saved_model(tmp_path / "model")
    assert find_profile(model) is None
    profile = profile_model(model, letters())
    kept = kept_profile(model)
    kept.parent.mkdir(parents=True)
    for path in (kept, tmp_path / "model" / FILE, tmp_path / "given.safetensors"):
        profile.save(path)
    assert kept.is_relative_to(cache)
    found = [find_profile(model, tmp_path / "given.safetensors"), find_profile(model)]
    (tmp_path / "model" / FILE).unlink()
    found.append(find_profile(model))
    places = [profile.path for profile in found if profile is not None]
    assert places == [tmp_path / "given.safetensors", tmp_path / "model" / FILE, kept]


def test_one_that_does_not_fit_is_an_error_where_somebody_put_it(tmp_path: Path) -> None:
    model = saved_model(tmp_path / "model")
    foreign = profile_model(small_model("qwen2"), letters())
    foreign.save(tmp_path / "given.safetensors")
    with pytest.raises(ProfileError, match="given.safetensors: .*another model"):
        find_profile(model, str(tmp_path / "given.safetensors"))
    with pytest.raises(ProfileError, match="none.safetensors"):
        obtain_profile(model, tmp_path / "none.safetensors")
    (tmp_path / "model" / FILE).write_bytes(b"nothing")
    with pytest.raises(ProfileError, match=FILE):
        find_profile(model)
    (tmp_path / "model" / FILE).unlink()
    # The cache folder is crushkv's own.
    kept = kept_profile(model)
    kept.parent.mkdir(parents=True)
    foreign.save(kept)
    assert find_profile(model) is None
    profile, where = obtain_profile(model)
    assert profile is not None and where == str(kept)
    Profile.load(kept).check(model)


def test_one_is_made_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = saved_model(tmp_path / "model")
    lines: list[str] = []
    first, where = obtain_profile(model, progress=lines.append)
    assert first is not None and where == str(kept_profile(model)) and Path(where).is_file()
    assert "once" in lines[0] and "7200 tokens" in lines[0] and where in lines[-1]
    assert obtain_profile(model)[1] == where and not capsys.readouterr().err
    Path(where).unlink()
    obtain_profile(small_model(), tokenizer=letters())  # of the same weights, in no folder
    assert "reading the essay" in capsys.readouterr().err and Path(where).is_file()


def test_without_a_tokenizer_there_is_none(tmp_path: Path) -> None:
    for model in (saved_model(tmp_path / "model", tokenizer=False), small_model()):
        profile, why = obtain_profile(model)
        assert profile is None and "tokenizer" in why


def test_a_folder_that_cannot_be_written_costs_a_warning(tmp_path: Path, cache: Path) -> None:
    cache.write_text("a file where the folder should be")
    with pytest.warns(UserWarning, match="crushkv: the profile cannot be kept") as warned:
        profile, where = obtain_profile(small_model(), tokenizer=letters(), progress=lambda line: None)
    assert profile is not None and profile.path is None and "not kept" in where and len(warned) == 1


@pytest.mark.model
def test_the_embedded_models_profile_is_in_the_package(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from crushkv.embedded import embedded_model_path

    monkeypatch.delenv("CRUSHKV_CACHE")
    folder = embedded_model_path()
    monkeypatch.setenv("CRUSHKV_CACHE", str(cache))
    for dtype in (torch.float32, torch.bfloat16):
        profile = find_profile(AutoModelForCausalLM.from_pretrained(folder, dtype=dtype))
        assert profile is not None and profile.path is not None and "profiles" in profile.path.parts
        assert profile.keys.shape == (30, 3, 64) and profile.path.stat().st_size < 100_000


# On the command line


def crushkv(*args: object) -> tuple[int, str]:
    import contextlib
    import io

    from crushkv.cli.app import _run

    err = io.StringIO()
    with contextlib.redirect_stderr(err):
        code = _run([str(arg) for arg in args])
    return code, err.getvalue()


def test_the_command_writes_a_profile(tmp_path: Path) -> None:
    model = saved_model(tmp_path / "model")
    code, err = crushkv("profile", tmp_path / "model", "-o", tmp_path / "a.safetensors")
    assert code == 0 and "[4/4] reading the dialogue" in err and "3 layers, 2 KV heads, 16 channels" in err
    Profile.load(tmp_path / "a.safetensors").check(model)
    assert not kept_profile(model).exists()
    code, err = crushkv("profile", "--model", tmp_path / "model")
    assert code == 0 and str(kept_profile(model)) in err and kept_profile(model).is_file()
    # A folder can carry its own, wherever it goes.
    shutil.copy(tmp_path / "a.safetensors", tmp_path / "model" / FILE)
    found = find_profile(model)
    assert found is not None and found.path == tmp_path / "model" / FILE


def test_the_command_refuses_what_it_cannot_do(tmp_path: Path) -> None:
    code, err = crushkv("profile", "a", "--model", "b")
    assert code == 2 and "given already" in err
    code, err = crushkv("profile", "-o", tmp_path / "none" / "a.safetensors")
    assert code == 2 and "the folder does not exist" in err
    assert issubclass(ProfileError, CrushError)
