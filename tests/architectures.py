"""Small random-weight models of real configuration classes: every architecture that is said to work."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from crushkv.core.heads import STEPS
from crushkv.fingerprint import fingerprint
from crushkv.profile import Profile

VOCAB = 128
SMALL: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,  # attention that prefers some tokens to others
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}

ARCHITECTURES: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**SMALL),
    "llama-mqa": lambda: LlamaConfig(**{**SMALL, "num_key_value_heads": 1}),
    "mistral": lambda: MistralConfig(**SMALL, sliding_window=None),
    "qwen2": lambda: Qwen2Config(**SMALL),
    "qwen3": lambda: Qwen3Config(**SMALL, head_dim=16),
    "phi3": lambda: Phi3Config(**SMALL, partial_rotary_factor=0.5),
    "gemma3": lambda: Gemma3TextConfig(
        **{**SMALL, "num_hidden_layers": 4},
        head_dim=16,
        sliding_window=16,
        layer_types=["sliding_attention", "full_attention"] * 2,
    ),
    "qwen3-moe": lambda: Qwen3MoeConfig(
        **SMALL, head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32
    ),
}


def small_model(architecture: str = "llama", attention: str = "sdpa", dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    config = ARCHITECTURES[architecture]()
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=dtype).eval()


def prompts(lengths: list[int], seed: int = 0) -> dict[str, torch.Tensor]:
    """A batch with left padding: `input_ids` and `attention_mask`, `[B, max(lengths)]`."""
    generator = torch.Generator().manual_seed(seed)
    longest = max(lengths)
    ids = torch.randint(2, VOCAB, (len(lengths), longest), generator=generator)
    mask = torch.stack([torch.arange(longest) >= longest - length for length in lengths]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def write_profile(model: Any, path: str | Path) -> None:
    """Heads that need very different numbers of tokens, and channels that are not alike."""
    config = model.config
    shape = (config.num_hidden_layers, config.num_key_value_heads)
    size = config.hidden_size // config.num_attention_heads
    energy = torch.rand(*shape, size, generator=torch.Generator().manual_seed(0)) + 0.1
    needs = torch.linspace(1, 0, STEPS).repeat(*shape, 1)
    needs[:, 1::2] **= 20  # every second head
    Profile(energy, energy, needs, fingerprint(model, any_dtype=True)).save(path)
