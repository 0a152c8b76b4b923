"""What replaces Transformers' attention gives the same, and is used where it may be and nowhere else."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from architectures import ARCHITECTURES, prompts, small_model
from crushkv import KVCrush, kernels
from crushkv.hf import attention

GREEDY: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "max_new_tokens": 12}
SMALL: dict[str, Any] = {"min_tokens": 0, "sink": 2, "window": 8, "interval": 8, "page_size": 4}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts the calls of both ways."""
    counted: Counter[str] = Counter()

    def counting(place: Any, name: str) -> None:
        function = getattr(place, name)

        def wrapper(*args: Any) -> Any:
            counted[name] += 1
            return function(*args)

        monkeypatch.setattr(place, name, wrapper)

    counting(kernels, "attend")
    counting(attention, "attention_with_mass")
    return counted


def logits(model: Any, policy: str, **options: Any) -> torch.Tensor:
    ids = torch.arange(1, 121)[None] % 100
    cache = KVCrush(policy=policy, budget=0.4, **SMALL, **options).cache(model)
    with torch.no_grad():
        steps = [model(input_ids=ids, past_key_values=cache).logits[:, -1]]
        for token in range(1, 20):
            steps.append(model(input_ids=torch.tensor([[token]]), past_key_values=cache).logits[:, -1])
    return torch.stack(steps)


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
# Not both: where a whole prompt's last bits differ, some code becomes the next one.
@pytest.mark.parametrize(("policy", "bits"), [("h2o", 16), ("snapkv", 16), ("snapkv", 4)])
def test_logits_are_those_of_transformers_attention(
    name: str, policy: str, bits: int, calls: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small_model(name)
    ours = logits(model, policy, bits=bits)
    used = Counter(calls)
    monkeypatch.setattr(attention, "is_plain", lambda *args: False)
    theirs = logits(model, policy, bits=bits)
    assert calls == used
    layers = len(KVCrush(**SMALL).cache(model).crushed_layers)
    if model.config._attn_implementation == "sdpa":
        assert used["attend"] == layers * 19
        assert used["attention_with_mass"] == (layers if policy == "h2o" else 0)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bits", [16, 4])
def test_masked_calls_give_the_same(calls: Counter[str], bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model()
    options: dict[str, Any] = {**GREEDY, "return_dict_in_generate": True, "output_logits": True}

    def found() -> torch.Tensor:
        with KVCrush(policy="h2o", budget=0.4, bits=bits, **SMALL)(model):
            return torch.stack(model.generate(**prompts([120, 77]), **options).logits)

    ours = found()
    assert calls["attend"] and not calls["attention_with_mass"]  # a prompt with padding is Transformers' own
    monkeypatch.setattr(attention, "is_plain", lambda *args: False)
    torch.testing.assert_close(ours, found(), rtol=1e-4, atol=1e-4)


def test_other_ways_of_attention_are_left_alone(calls: Counter[str]) -> None:
    model = small_model()
    model.set_attn_implementation("eager")
    with KVCrush(policy="h2o", budget=0.4, **SMALL)(model):
        model.generate(**prompts([120]), **GREEDY)
    assert not calls
