"""Qwen2.5-Omni whole: its `generate` calls that of a model that thinks, and then that of one that talks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForMultimodalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from architectures import prompts
from crushkv import KVCrush
from crushkv.hf.interface import CACHE
from model_zoo import VOCAB, small_config
from picture_models import MROPE, PICTURES

TALKER = {
    **{"model_type": "qwen2_5_omni_talker", "embedding_size": 64, "head_dim": 16},
    **{"tts_text_start_token_id": 100, "tts_text_end_token_id": 101, "tts_text_pad_token_id": 102},
    **{"tts_codec_start_token_id": 103, "tts_codec_end_token_id": 104, "tts_codec_pad_token_id": 105},
    "tts_codec_mask_token_id": 106,
}
VOICE = {
    "dit_config": {
        **{"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 16, "emb_dim": 16},
        **{"num_embeds": VOCAB, "mel_dim": 8, "block_size": 8, "look_ahead_layers": [1], "look_backward_layers": [0]},
        **{"enc_emb_dim": 8, "enc_dim": 8, "enc_channels": [16] * 4 + [48]},
        **{"enc_attention_channels": 8, "enc_se_channels": 8},
    },
    "bigvgan_config": {"mel_dim": 8, "upsample_initial_channel": 64},
}


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    thinker = PICTURES["qwen2_5_omni_thinker"].fields()
    talker = small_config("qwen2", MROPE).to_dict() | TALKER | {k: v for k, v in thinker.items() if k.endswith("index")}
    config = CONFIG_MAPPING["qwen2_5_omni"](thinker_config=thinker, talker_config=talker, token2wav_config=VOICE)
    model = AutoModelForMultimodalLM.from_config(config).eval()
    model.speaker_map = {"Chelsie": {"bos_token": 5, "cond": torch.randn(1, 8), "ref_mel": torch.randn(1, 30, 8)}}
    return model


def answer(model: Any) -> tuple[Tensor, Tensor]:
    """Tokens and sound."""
    torch.manual_seed(1)  # the sound begins as noise
    return model.generate(
        **prompts([60]),
        thinker_max_new_tokens=6,
        thinker_do_sample=False,
        thinker_pad_token_id=0,
        talker_max_new_tokens=6,
        talker_do_sample=False,
        talker_eos_token_id=[104],
    )


def test_the_whole_budget_changes_no_sound(model: Any) -> None:
    tokens, sound = answer(model)
    with KVCrush(budget=1.0)(model):
        same_tokens, same_sound = answer(model)
    assert torch.equal(tokens, same_tokens)
    assert sound.numel() and torch.equal(sound, same_sound)


def test_who_thinks_and_who_talks_are_compressed(model: Any) -> None:
    caches: dict[str, Any] = {}
    hooks = [
        module.register_forward_hook(lambda module, _, output: caches.update({type(module).__name__: output[CACHE]}))
        for module in (model.thinker, model.talker)
    ]
    with KVCrush(budget=24, sink=2, window=8, page_size=4, interval=4)(model):
        answer(model)
    for hook in hooks:
        hook.remove()
    assert len(caches) == 2
    for cache in caches.values():
        report = cache.report()
        assert report.tokens_seen > 60 and report.tokens_held < 30
