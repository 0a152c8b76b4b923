"""What can be seen on a GPU only: the same cache as on a CPU, and no wait for the device while decoding."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from architectures import VOCAB, small_model, write_profile
from crushkv import KVCrush
from crushkv.errors import ScoreError
from crushkv.hf.interface import passed
from crushkv.presets import PRESETS
from crushkv.storage import RAW, Formats, TieredStorage

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
FORMATS = [
    Formats((4, 4), (4, 4)),
    Formats((8, 8), (2, 2)),
    Formats((3, 3), (3, 3), rotation=False),
    Formats((RAW, RAW), (RAW, RAW), rank=5),
    Formats((2.25, 2), (2.25, 2), (4, 4), by_channel=True),
    Formats((4, 3), (2, 2), (8, 8), by_channel=True),
]


@pytest.fixture(autouse=True)
def no_warning_of_a_missing_profile() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*chosen from each prompt")  # a random model has no profile
        yield


def pair() -> tuple[Any, Any]:
    """The same model on a CPU and on the GPU."""
    model = small_model()
    return model, copy.deepcopy(model).to("cuda")


@pytest.fixture
def profile(tmp_path: Path) -> str:
    """With it, heads of a layer hold different numbers of tokens."""
    write_profile(small_model(), tmp_path / "profile.safetensors")
    return str(tmp_path / "profile.safetensors")


@pytest.mark.parametrize("formats", FORMATS, ids=str)
def test_a_storage_holds_the_same(formats: Formats) -> None:
    generator = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(2, 3, 601, 16, generator=generator) for _ in range(2))
    stores = []
    for device in ("cpu", "cuda"):
        store = TieredStorage(formats)
        store.append(keys.to(device), values.to(device))
        store.fit(None)
        lengths = [300, 200] if len(formats.contested) == 2 else [500]
        lengths += [41, 0] if formats.recent_block else [41]
        store.keep(torch.arange(541, device=device).expand(2, 3, -1), lengths[: len(formats.blocks) + 1])
        stores.append(store)
    assert stores[0].nbytes == stores[1].nbytes
    for here, there in zip(*(store.read() for store in stores), strict=True):
        # On the border of two cells, a number may fall into either.
        off = (here - there.cpu()).abs()
        assert (off > 1e-3).float().mean() < 1e-3


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("by_need", [False, True])
def test_a_cache_gives_the_same_logits(preset: str, by_need: bool, profile: str) -> None:
    prompt = torch.randint(2, VOCAB, (2, 400), generator=torch.Generator().manual_seed(1))
    logits, reports = [], []
    for model in pair():
        given = {"profile": profile} if by_need else {}
        cache = KVCrush(preset, min_tokens=0, interval=8, **given).cache(model)
        with torch.inference_mode():
            model(input_ids=prompt[:, :350].to(model.device), **passed(cache))
            found = [
                model(input_ids=prompt[:, i : i + 1].to(model.device), **passed(cache)).logits for i in range(350, 380)
            ]
        logits.append(torch.cat(found, dim=1).float().log_softmax(-1).cpu())
        reports.append(cache.report())
    assert reports[0].kv_bytes == reports[1].kv_bytes
    assert reports[0].tiers == reports[1].tiers
    divergence = (logits[0].exp() * (logits[0] - logits[1])).sum(-1)
    assert divergence.mean() < 1e-3


@pytest.mark.parametrize("preset", PRESETS)
def test_a_decoded_token_waits_for_nothing(preset: str, profile: str) -> None:
    model = small_model().to("cuda")
    cache = KVCrush(preset, min_tokens=0, profile=profile).cache(model)
    tokens = torch.randint(2, VOCAB, (2, 400), device="cuda")
    with torch.inference_mode():
        for _ in range(4):  # reads the prompt, makes room, compiles
            tokens = model(input_ids=tokens, **passed(cache), logits_to_keep=1).logits.argmax(-1)
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(4):
                tokens = model(input_ids=tokens, **passed(cache), logits_to_keep=1).logits.argmax(-1)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert cache.report().bytes_fraction < 0.9


def test_scores_that_are_not_finite_end_the_pass() -> None:
    """They are looked at when all layers have evicted, which may not let any pass."""
    model = small_model().to("cuda")
    model.model.layers[0].self_attn.v_proj.weight.data[0] = torch.nan
    cache = KVCrush("balanced", min_tokens=0).cache(model)
    with torch.inference_mode(), pytest.raises(ScoreError, match="NaN or infinite"):
        model(input_ids=torch.randint(2, VOCAB, (1, 400), device="cuda"), **passed(cache))
