"""RoPE as it is measured from a model: what is found undoes what the model did to its keys."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    CohereConfig,
    Gemma3TextConfig,
    GlmConfig,
    GPT2Config,
    GPTJConfig,
    GPTNeoXConfig,
    GptOssConfig,
    LlamaConfig,
    OPTConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    SmolLM3Config,
)
from transformers.cache_utils import DynamicCache, DynamicLayer

from architectures import SMALL, VOCAB
from crushkv import KVCrush
from crushkv.hf.rope import examine_ropes, find_ropes
from crushkv.rope import Rope

HEADS = {name: value for name, value in SMALL.items() if name != "num_key_value_heads"}


def scaled(**rope: Any) -> PreTrainedConfig:
    return LlamaConfig(**SMALL, rope_parameters={"rope_theta": 1e4, **rope})


def gemma3(layer_types: list[str]) -> PreTrainedConfig:
    angles = {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}}
    angles["sliding_attention"] = {"rope_type": "default", "rope_theta": 1e4}
    return Gemma3TextConfig(
        **{**SMALL, "num_hidden_layers": len(layer_types)},
        head_dim=16,
        sliding_window=16,
        layer_types=layer_types,
        rope_parameters=angles,
    )


def longrope() -> PreTrainedConfig:
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    factors = {"short_factor": [1.0, 1.0, 1.1, 1.2], "long_factor": [1.0, 2.0, 8.0, 20.0]}
    return Phi3Config(**SMALL, original_max_position_embeddings=64, rope_parameters={**rope, **factors})


# How many of the 16 channels turn, and the channels that are turned with the first two.
TURNING: dict[str, tuple[Callable[[], PreTrainedConfig], int, tuple[int, int]]] = {
    "default": (lambda: LlamaConfig(**SMALL), 16, (8, 9)),
    "llama3": (
        lambda: scaled(
            rope_type="llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=64,
        ),
        16,
        (8, 9),
    ),
    "linear": (lambda: scaled(rope_type="linear", factor=4.0), 16, (8, 9)),
    "dynamic": (lambda: scaled(rope_type="dynamic", factor=4.0), 16, (8, 9)),
    "yarn": (lambda: scaled(rope_type="yarn", factor=8.0, original_max_position_embeddings=64), 16, (8, 9)),
    "partial": (lambda: Phi3Config(**SMALL, partial_rotary_factor=0.5), 8, (4, 5)),
    "longrope": (longrope, 8, (4, 5)),
    "bias": (lambda: Qwen2Config(**SMALL), 16, (8, 9)),
    "norm before": (lambda: gemma3(["full_attention", "sliding_attention"]), 16, (8, 9)),
    "interleaved": (lambda: CohereConfig(**SMALL), 16, (1, 0)),
    "interleaved, partial": (lambda: GlmConfig(**SMALL, head_dim=16), 8, (1, 0)),
    "a quarter": (lambda: GPTNeoXConfig(**HEADS), 4, (2, 3)),
    "no module": (
        lambda: GPTJConfig(
            vocab_size=VOCAB, n_positions=512, n_embd=64, n_layer=2, n_head=4, rotary_dim=8, initializer_range=0.3
        ),
        8,
        (1, 0),
    ),
}
STILL: dict[str, Callable[[], PreTrainedConfig]] = {
    "learned positions": lambda: GPT2Config(vocab_size=VOCAB, n_positions=512, n_embd=64, n_layer=2, n_head=4),
    "learned positions, few": lambda: OPTConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        ffn_dim=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=20,
        word_embed_proj_dim=64,
    ),
    "ALiBi": lambda: BloomConfig(vocab_size=VOCAB, hidden_size=64, n_layer=2, n_head=4),
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def made(config: PreTrainedConfig, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def cached_keys(model: Any, input_ids: Tensor, **inputs: Any) -> list[Tensor]:
    """Keys of the layers that can be compressed, as attention received them: `[B, Hkv, S, D]`."""
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=input_ids, past_key_values=cache, use_cache=True, **inputs)
    return [layer.keys for layer in cache.layers if type(layer) is DynamicLayer and layer.keys is not None]


def one_token(model: Any, positions: list[int]) -> list[Tensor]:
    """One token by itself at many positions: a layer's keys `[P, Hkv, D]`."""
    at = torch.tensor(positions)[:, None]
    return [keys[:, :, 0] for keys in cached_keys(model, torch.full_like(at, 17), position_ids=at)]


POSITIONS = [0, 1, 2, 5, 37, 60, 63]  # few of them are among those that are asked for


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", TURNING)
def test_what_is_found_undoes_what_the_model_does(name: str, dtype: torch.dtype) -> None:
    config, turned, partners = TURNING[name]
    model = made(config(), dtype)
    # A cast casts frequencies, too: what counts is what the model does then.
    ropes = find_ropes(model, 64)
    exact = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    assert ropes
    for rope, keys in zip(ropes, one_token(model, POSITIONS), strict=True):
        assert rope is not None
        assert int((rope.frequencies != 0).sum()) == turned and tuple(rope.partner[:2].tolist()) == partners
        assert torch.equal(rope.partner[rope.partner], torch.arange(16))
        assert torch.equal(rope.frequencies[rope.partner], -rope.frequencies)
        at = torch.tensor(POSITIONS)[:, None]
        back = rope.unturned(keys, at)
        assert (back - back[:1]).norm() <= exact * back.norm()
        assert (keys.float() - keys[:1].float()).norm() > 0.1 * back.norm(), "they were turned"
        again = rope.turned(back, at)
        assert torch.allclose(again, keys.float(), atol=1e-5 * float(again.abs().max()))


@pytest.mark.parametrize("name", STILL)
def test_without_rope_nothing_is_found(name: str) -> None:
    findings = examine_ropes(made(STILL[name]()), 16)
    assert [finding.rope for finding in findings] == [None, None]
    assert all("no RoPE" in finding.text for finding in findings), findings


def test_layers_differ() -> None:
    config = SmolLM3Config(**SMALL, no_rope_layers=[1, 0, 1])
    first, second, third = examine_ropes(made(config))
    assert first.rope is not None and third.rope is not None and second.rope is None
    assert "same at every position" in second.text and "16 of 16 channels" in first.text
    # Two kinds of angles in one model: the layers with a sliding window are not asked for.
    (long,) = find_ropes(made(gemma3(["full_attention", "sliding_attention"])))
    assert long is not None and float(long.frequencies.abs().max()) == pytest.approx(1 / 8)


def test_hidden_states_that_drift_apart_are_levelled() -> None:
    """With attention sinks, rounding in 16 bits depends on the position, and grows from layer to layer."""
    layers = 16
    experts = {"num_local_experts": 8, "intermediate_size": 128, "hidden_size": 128, "head_dim": 32}
    size = {"num_hidden_layers": layers, "layer_types": ["full_attention"] * layers, "max_position_embeddings": 8192}
    rope = {"rope_type": "default", "rope_theta": 1e4}
    config = GptOssConfig(**{**SMALL, **experts, **size, "initializer_range": 0.1}, rope_parameters=rope)
    model = made(config, torch.bfloat16)
    findings = examine_ropes(model, 100)
    assert {finding.text for finding in findings} == {"RoPE turns 32 of 32 channels, in half-split pairs"}
    assert examine_ropes(model, 8000) is findings, "the length of a pass does not matter"


def test_a_model_that_cannot_be_asked_is_left_alone() -> None:
    model = made(LlamaConfig(**SMALL))

    def forward(input_ids: Tensor) -> None:
        raise AssertionError

    model.model.forward = forward
    findings = examine_ropes(model)
    assert [finding.rope for finding in findings] == [None] * 3
    assert all("cannot be asked" in finding.text and "TypeError" in finding.text for finding in findings)


def add_constant(model: Any, constant: Tensor) -> None:
    """Adds `[Hkv, D]` to the first layer's keys before RoPE."""
    layer = next(module for module in model.modules() if hasattr(module, "self_attn") or hasattr(module, "attention"))
    attention = layer.self_attn if hasattr(layer, "self_attn") else layer.attention
    kv_heads, size = constant.shape
    if hasattr(attention, "k_norm"):

        class Shifted(nn.Module):
            def __init__(self, norm: nn.Module) -> None:
                super().__init__()
                self.norm = norm

            def forward(self, keys: Tensor) -> Tensor:  # [B, Hkv, S, D]
                return self.norm(keys) + constant[:, None]

        attention.k_norm = Shifted(attention.k_norm)
        return
    if hasattr(attention, "query_key_value"):  # [H, 3, D]
        linear, shift = attention.query_key_value, torch.zeros(kv_heads, 3, size)
        shift[:, 1] = constant
    elif hasattr(attention, "qkv_proj"):
        linear, shift = attention.qkv_proj, torch.zeros(attention.qkv_proj.out_features)
        start = attention.qkv_proj.out_features - 2 * constant.numel()
        shift[start : start + constant.numel()] = constant.flatten()
    else:
        linear, shift = attention.k_proj, constant
    bias = torch.zeros(linear.out_features) if linear.bias is None else linear.bias.data
    linear.bias = nn.Parameter(bias + shift.flatten())


@pytest.mark.parametrize("name", [name for name in TURNING if name != "no module"])
def test_a_constant_before_rope_goes_away(name: str) -> None:
    config = TURNING[name][0]
    tokens = torch.randint(2, VOCAB, (1, 60), generator=torch.Generator().manual_seed(1))
    at = torch.arange(60)

    def centred(model: Any) -> tuple[Tensor, Tensor]:
        (rope, *_), (keys, *_) = find_ropes(model, 60), cached_keys(model, tokens)
        assert rope is not None
        keys = keys[0]
        before = rope.unturned(keys, at)
        return before - before.mean(1, keepdim=True), keys - keys.mean(1, keepdim=True)

    plain, _ = centred(made(config()))
    model = made(config())
    constant = torch.randn(plain.shape[0], plain.shape[2], generator=torch.Generator().manual_seed(2))
    add_constant(model, constant * 100 * plain.std())
    shifted, after = centred(model)
    assert (shifted - plain).norm() < 1e-3 * plain.norm()
    assert after.norm() > 10 * plain.norm(), "a mean after RoPE does not take it away"


@pytest.mark.parametrize(("name", "short", "long"), [("longrope", 60, 300), ("dynamic", 60, 2000)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_length_of_a_pass_counts_where_the_model_says_so(
    name: str, short: int, long: int, dtype: torch.dtype
) -> None:
    model = made(TURNING[name][0](), dtype)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    for _ in range(2):  # back and forth
        for positions in (short, long):
            rope, at = find_ropes(model, positions)[0], [0, 3, 41, positions - 1]
            assert rope is not None
            back = rope.unturned(one_token(model, at)[0], torch.tensor(at)[:, None])
            assert (back - back[:1]).norm() <= tolerance * back.norm()
    near, far = find_ropes(model, short)[0], find_ropes(model, long)[0]
    assert near is not None and far is not None
    assert not torch.allclose(near.frequencies, far.frequencies, rtol=0.05)


@pytest.mark.parametrize("name", ["longrope", "dynamic"])
def test_the_model_is_as_it_was(name: str) -> None:
    tokens = torch.randint(2, VOCAB, (1, 600), generator=torch.Generator().manual_seed(1))

    def passes(model: Any) -> list[Tensor]:
        # Short, long (beyond what it was trained with), of medium length, which keeps what the long one has set.
        return [model(input_ids=tokens[:, :length]).logits for length in (40, 600, 560)]

    with torch.no_grad():
        expected = passes(made(TURNING[name][0]()))
        model = made(TURNING[name][0]())
        logits = []
        for length in (40, 600, 560):
            buffers = {key: buffer.clone() for key, buffer in model.named_buffers()}
            find_ropes(model, 3000)
            find_ropes(model, 20)
            assert all(torch.equal(buffer, buffers[key]) for key, buffer in model.named_buffers())
            logits.append(model(input_ids=tokens[:, :length]).logits)
    assert all(torch.equal(a, b) for a, b in zip(logits, expected, strict=True))


def test_an_open_block_is_passed_by() -> None:
    model = made(LlamaConfig(**SMALL))
    tokens = torch.randint(2, VOCAB, (1, 50))
    with KVCrush(budget=0.5, sink=2, window=4)(model) as session, torch.inference_mode():
        model(input_ids=tokens)
        cache = session.cache
        assert cache is not None
        seen = cache.get_seq_length()
        ropes = find_ropes(model)
        assert session.cache is cache and cache.get_seq_length() == seen
    assert ropes[0] is not None and not ropes[0].frequencies.is_inference()


def test_a_model_is_asked_once() -> None:
    model = made(LlamaConfig(**SMALL))
    passes = []
    forward = model.model.forward

    def counted(*args: Any, **kwargs: Any) -> Any:
        passes.append(kwargs["input_ids"].shape)
        return forward(*args, **kwargs)

    model.model.forward = counted
    first = find_ropes(model)
    assert len(passes) == 2 and max(shape[0] for shape in passes) < 20
    assert find_ropes(model, 400)[0] is first[0] and len(passes) == 2
    model.to(torch.bfloat16)
    assert find_ropes(model)[0] is not first[0] and len(passes) == 4


def test_energies_of_a_pair_are_averaged() -> None:
    rope = Rope(torch.tensor([2, 1, 0]), torch.tensor([-0.5, 0.0, 0.5]))
    assert rope.averaged(torch.tensor([1.0, 5.0, 3.0])).tolist() == [2.0, 5.0, 2.0]
