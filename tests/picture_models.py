"""Tiny random models that read a picture, made by hand: one line a model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from architectures import prompts
from model_zoo import ITSELF, TEXT, VOCAB, Model, broken, refused, since, small_config, works

IMAGE = VOCAB - 1  # the token in whose place a part of the picture stands
START = 25  # of the picture in the prompt, behind the padding of the shorter row
LENGTHS = [60, 41]

CLIP = {"model_type": "clip_vision_model", "image_size": 28, "patch_size": 14, "projection_dim": 32}
SIGLIP = {"model_type": "siglip_vision_model", "image_size": 28, "patch_size": 14}
TOWER = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}

QFORMER = {
    "vision_config": {"image_size": 28, "patch_size": 14, "initializer_range": 0.3} | TOWER,
    "qformer_config": TOWER | {"encoder_hidden_size": 32, "vocab_size": 100, "initializer_range": 0.3},
    "num_query_tokens": 4,
    "image_token_index": IMAGE,
}


@dataclass(frozen=True)
class PictureModel:
    """A wrapper, its configuration, and the picture of one row.

    Attributes:
        tokens: in whose places the picture stands.
        picture: from the number of rows, what the model is given besides `input_ids` and `attention_mask`; None: it is
            not shown any.
        expected: the same as for a model that only reads.
        within: `generate` always wants the picture, and calls that of the text model within, which the oracle does not
            follow.
    """

    fields: Callable[[], dict[str, Any]]
    tokens: int = 0
    picture: Callable[[int], dict[str, Tensor]] | None = None
    expected: Model = field(default_factory=works)
    within: bool = False


def text(kind: str = "llama", **fields: Any) -> dict[str, Any]:
    found = small_config(kind, TEXT[kind].fields | fields).to_dict()
    return found | {"model_type": CONFIG_MAPPING[kind].model_type}


def pixels(size: int = 28) -> Callable[[int], dict[str, Tensor]]:
    return lambda rows: {"pixel_values": noise(rows, 3, size, size)}


def grid(channels: int, height: int = 4, width: int = 4) -> Callable[[int], dict[str, Tensor]]:
    """Patches of all pictures behind each other, and how many there are."""
    return lambda rows: {
        "pixel_values": noise(rows * height * width, channels),
        "image_grid_thw": torch.tensor([[1, height, width]] * rows),
    }


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def picture_config(kind: str) -> Any:
    return CONFIG_MAPPING[kind](**PICTURES[kind].fields())


def build_picture_model(kind: str) -> Any:
    torch.manual_seed(0)
    config = picture_config(kind)
    auto = AutoModelForImageTextToText if kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES else AutoModelForCausalLM
    model = auto.from_config(config).eval()
    # Gates and projections that begin with zeros would hide the picture.
    for parameter in model.parameters():
        if not bool(parameter.any()):
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def picture_prompts(kind: str) -> dict[str, Tensor]:
    """The prompts of `prompts`, with a picture in each row."""
    inputs = prompts(LENGTHS)
    inputs["input_ids"] = inputs["input_ids"].clamp(max=VOCAB - 8) * inputs["attention_mask"]
    model = PICTURES[kind]
    inputs["input_ids"][:, START : START + model.tokens] = IMAGE
    inputs |= model.picture(len(LENGTHS)) if model.picture else {}
    if "image_grid_thw" in inputs and "omni" not in kind:  # Omni tells pictures from sounds by the tokens alone
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == IMAGE).long()
    return inputs


QWEN_VISION = {"depth": 2, "hidden_size": 32, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2}
QWEN3_VISION = QWEN_VISION | {
    "out_hidden_size": 64,
    "intermediate_size": 32,
    "deepstack_visual_indexes": [0],
    "num_position_embeddings": 16,
}
QWEN_TOKENS = {"image_token_id": IMAGE, "video_token_id": IMAGE - 1, "vision_start_token_id": IMAGE - 2}
OMNI_TOKENS = {
    **{"image_token_index": IMAGE, "video_token_index": IMAGE - 1, "audio_token_index": IMAGE - 2},
    **{"image_token_id": IMAGE, "video_token_id": IMAGE - 1, "audio_token_id": IMAGE - 2},
    **{"vision_start_token_id": IMAGE - 3, "audio_start_token_id": IMAGE - 4, "audio_end_token_id": IMAGE - 5},
}
HEARING = {"d_model": 32, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 32}
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}}
MROPE_OF_8 = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}

PICTURES: dict[str, PictureModel] = {
    "llava": PictureModel(
        lambda: {"text_config": text(), "vision_config": CLIP | TOWER, "image_token_index": IMAGE}, 4, pixels()
    ),
    "vipllava": PictureModel(
        lambda: {
            "text_config": text(),
            "vision_config": CLIP | TOWER,
            "image_token_index": IMAGE,
            "vision_feature_layers": [-2, -1],
        },
        4,
        pixels(),
    ),
    "paligemma": PictureModel(
        lambda: {
            "text_config": text("gemma"),
            "vision_config": SIGLIP | TOWER,
            "image_token_index": IMAGE,
            "projection_dim": 64,
        },
        4,
        pixels(),
    ),
    "gemma3": PictureModel(
        lambda: {
            "text_config": text("gemma3_text"),
            "vision_config": SIGLIP | TOWER,
            "image_token_index": IMAGE,
            "mm_tokens_per_image": 4,
        },
        4,
        pixels(),
    ),
    "aya_vision": PictureModel(
        lambda: {
            "text_config": text("cohere2"),
            "vision_config": SIGLIP | TOWER | {"image_size": 56},
            "image_token_index": IMAGE,
        },
        4,
        pixels(56),
    ),
    "cohere2_vision": PictureModel(
        lambda: {
            "text_config": text("cohere2"),
            "vision_config": SIGLIP | TOWER | {"image_size": 56},
            "image_token_id": IMAGE,
        },
        4,
        pixels(56),
    ),
    "internvl": PictureModel(
        lambda: {
            "text_config": text("qwen2"),
            "vision_config": {"model_type": "internvl_vision", "image_size": [56, 56], "patch_size": [14, 14]} | TOWER,
            "image_token_id": IMAGE,
        },
        4,
        pixels(56),
    ),
    "mistral3": PictureModel(
        lambda: {
            "text_config": text("mistral"),
            "vision_config": {"model_type": "pixtral", "image_size": 56, "patch_size": 14, "head_dim": 16} | TOWER,
            "image_token_index": IMAGE,
        },
        4,
        lambda rows: pixels(56)(rows) | {"image_sizes": torch.tensor([[56, 56]] * rows)},
    ),
    "idefics2": PictureModel(
        lambda: {
            "text_config": text("mistral"),
            "vision_config": {"image_size": 28, "patch_size": 14} | TOWER,
            "perceiver_config": {
                "hidden_size": 64,
                "resampler_n_latents": 4,
                "resampler_depth": 1,
                "resampler_n_heads": 4,
                "resampler_head_dim": 16,
                "num_key_value_heads": 2,
            },
            "image_token_id": IMAGE,
        },
        4,
        lambda rows: {"pixel_values": noise(rows, 1, 3, 28, 28)},
    ),
    "idefics3": PictureModel(
        lambda: {
            "text_config": text(),
            "vision_config": {"image_size": 56, "patch_size": 14} | TOWER,
            "image_token_id": IMAGE,
            "scale_factor": 2,
        },
        4,
        lambda rows: {"pixel_values": noise(rows, 1, 3, 56, 56)},
    ),
    "smolvlm": PictureModel(
        lambda: {
            "text_config": text(),
            "vision_config": {"image_size": 56, "patch_size": 14} | TOWER,
            "image_token_id": IMAGE,
            "scale_factor": 2,
        },
        4,
        lambda rows: {"pixel_values": noise(rows, 1, 3, 56, 56)},
    ),
    "mllama": PictureModel(
        lambda: {
            "text_config": text(
                "llama", model_type="mllama_text_model", cross_attention_layers=[1], rope_parameters=None
            ),
            "vision_config": {
                "hidden_size": 32,
                "intermediate_size": 32,
                "num_hidden_layers": 2,
                "num_global_layers": 1,
                "attention_heads": 2,
                "image_size": 28,
                "patch_size": 14,
                "max_num_tiles": 1,
                "intermediate_layers_indices": [0],
                "vision_output_dim": 64,
                "supported_aspect_ratios": [[1, 1]],
            },
            "image_token_index": IMAGE,
        },
        1,
        lambda rows: {
            "pixel_values": noise(rows, 1, 1, 3, 28, 28),
            "aspect_ratio_ids": torch.ones(rows, 1, dtype=torch.long),
            "aspect_ratio_mask": torch.ones(rows, 1, 1, dtype=torch.long),
            "cross_attention_mask": torch.ones(rows, max(LENGTHS), 1, 1, dtype=torch.long),
        },
    ),
    "qwen2_vl": PictureModel(
        lambda: {
            "text_config": text("qwen2", **MROPE) | {"model_type": "qwen2_vl_text"},
            "vision_config": QWEN_VISION | {"embed_dim": 32, "hidden_size": 64},
            **QWEN_TOKENS,
        },
        4,
        grid(3 * 2 * 4 * 4),
    ),
    "qwen2_5_vl": PictureModel(
        lambda: {
            "text_config": text("qwen2", **MROPE) | {"model_type": "qwen2_5_vl_text"},
            "vision_config": QWEN_VISION
            | {"out_hidden_size": 64, "intermediate_size": 32, "window_size": 8, "fullatt_block_indexes": [1]},
            **QWEN_TOKENS,
        },
        4,
        grid(3 * 2 * 4 * 4),
    ),
    "qwen2_5_omni_thinker": PictureModel(
        lambda: {
            "text_config": text("qwen2", **MROPE) | {"model_type": "qwen2_5_omni_text"},
            "vision_config": QWEN_VISION
            | {"out_hidden_size": 64, "intermediate_size": 32, "window_size": 8, "fullatt_block_indexes": [1]},
            "audio_config": HEARING | {"output_dim": 64},
            **OMNI_TOKENS,
        },
        4,
        grid(3 * 2 * 4 * 4),
    ),
    "qwen3_omni_moe_thinker": PictureModel(
        lambda: {
            "text_config": text("qwen3_moe", **MROPE) | {"model_type": "qwen3_omni_moe_text"},
            "vision_config": QWEN3_VISION,
            "audio_config": HEARING | {"output_dim": 64, "downsample_hidden_size": 16},
            **OMNI_TOKENS,
        },
        4,
        grid(3 * 2 * 4 * 4),
    ),
    "qwen3_vl": PictureModel(
        lambda: {
            "text_config": text("qwen3", **MROPE) | {"model_type": "qwen3_vl_text"},
            "vision_config": QWEN3_VISION,
            **QWEN_TOKENS,
        },
        4,
        grid(3 * 2 * 4 * 4),
    ),
    "qwen3_5": PictureModel(
        lambda: {
            "text_config": text("qwen3_5_text"),
            "vision_config": QWEN_VISION
            | {"out_hidden_size": 64, "intermediate_size": 32, "num_position_embeddings": 16},
            **QWEN_TOKENS,
        },
        4,
        grid(3 * 2 * 4 * 4),
    ),
    "got_ocr2": PictureModel(
        lambda: {
            "text_config": text("qwen2"),
            "vision_config": {
                "hidden_size": 32,
                "output_channels": 16,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "image_size": 64,
                "patch_size": 8,
                "mlp_dim": 32,
                "initializer_range": 0.3,
                "window_size": 4,
                "global_attn_indexes": [0],
            },
            "image_token_index": IMAGE,
        },
        4,
        pixels(64),
    ),
    "lfm2_vl": PictureModel(
        lambda: {
            "text_config": text("lfm2"),
            "vision_config": {"model_type": "siglip2_vision_model", "patch_size": 4, "num_patches": 16} | TOWER,
            "image_token_id": IMAGE,
            "downsample_factor": 2,
        },
        4,
        lambda rows: {
            "pixel_values": noise(rows, 16, 48),
            "spatial_shapes": torch.tensor([[4, 4]] * rows),
            "pixel_attention_mask": torch.ones(rows, 16, dtype=torch.long),
        },
    ),
    "llama4": PictureModel(
        lambda: {
            "text_config": text("llama4_text"),
            "vision_config": {
                "hidden_size": 32,
                "intermediate_size": 128,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "image_size": 28,
                "patch_size": 7,
                "vision_output_dim": 32,
                "projector_input_dim": 32,
                "projector_output_dim": 32,
                "pixel_shuffle_ratio": 0.5,
            },
            "image_token_index": IMAGE,
        },
        4,
        pixels(),
        since((5, 24), broken("no attribute 'image_outputs'"), works()),
    ),
    "gemma4": PictureModel(
        lambda: {
            "text_config": text("gemma4_text"),
            "vision_config": {"patch_size": 4, "pooling_kernel_size": 2, "position_embedding_size": 16}
            | TOWER
            | {"num_key_value_heads": 2, "head_dim": 16},
            "audio_config": None,
            "image_token_id": IMAGE,
        },
        4,
        lambda rows: {
            "pixel_values": noise(rows, 16, 48),
            "image_position_ids": torch.cartesian_prod(torch.arange(4), torch.arange(4)).expand(rows, -1, -1),
        },
    ),
    "glm4v": PictureModel(
        lambda: {
            "text_config": text("glm4", **MROPE_OF_8) | {"model_type": "glm4v_text"},
            "vision_config": QWEN_VISION | {"out_hidden_size": 64, "intermediate_size": 32, "image_size": 16},
            **QWEN_TOKENS,
        },
        4,
        grid(3 * 2 * 4 * 4),
    ),
    "fuyu": PictureModel(
        lambda: {
            "text_config": text("persimmon"),
            "image_token_id": IMAGE,
            "patch_size": 4,
            "hidden_size": 64,
            "vocab_size": VOCAB,
        },
        4,
        lambda rows: {"image_patches": noise(rows, 4, 48)},
    ),
    "blip-2": PictureModel(lambda: {"text_config": text("opt"), **QFORMER}, 4, pixels(), within=True),
    "instructblip": PictureModel(
        lambda: {"text_config": text("opt"), **QFORMER},
        4,
        lambda rows: {
            "qformer_input_ids": torch.full((rows, 3), 5),
            "qformer_attention_mask": torch.ones(rows, 3, dtype=torch.long),
            **pixels()(rows),
        },
        within=True,
    ),
    "kosmos-2": PictureModel(
        lambda: {
            "text_config": {
                "vocab_size": VOCAB,
                "embed_dim": 64,
                "layers": 3,
                "ffn_dim": 64,
                "attention_heads": 4,
                "max_position_embeddings": 512,
                "init_std": 0.3,
            },
            "vision_config": {"image_size": 28, "patch_size": 14, "initializer_range": 0.3} | TOWER,
            "latent_query_num": 4,
        },
        4,
        lambda rows: {
            "image_embeds_position_mask": torch.arange(START, START + 4)
            .eq(torch.arange(max(LENGTHS))[:, None])
            .any(1)
            .expand(rows, -1),
            **pixels()(rows),
        },
        within=True,
    ),
    "git": PictureModel(
        lambda: {"vision_config": {"image_size": 28, "patch_size": 14} | TOWER, **text("bert", is_decoder=True)},
        0,
        pixels(),
        refused(ITSELF),
    ),
    "qwen3_5_moe": PictureModel(
        lambda: {
            "text_config": text("qwen3_5_moe_text"),
            "vision_config": QWEN_VISION
            | {"out_hidden_size": 64, "intermediate_size": 32, "num_position_embeddings": 16},
            **QWEN_TOKENS,
        },
        4,
        grid(3 * 2 * 4 * 4),
    ),
    # Without a picture: these are in `AutoModelForCausalLM`, which builds them with all their parts.
    "phi4_multimodal": PictureModel(
        lambda: {
            **text("phi3", model_type="phi4_multimodal"),
            "vision_config": {"image_size": 28, "patch_size": 14, "crop_size": 28} | TOWER,
            "audio_config": {
                "hidden_size": 32,
                "intermediate_size": 32,
                "num_blocks": 1,
                "num_attention_heads": 2,
                "ext_pw_out_channel": 32,
                "nemo_conv_channels": 32,
            },
        },
    ),
    "emu3": PictureModel(
        lambda: {
            "text_config": text(),
            "vocabulary_map": {"<image>": IMAGE},
            "vq_config": {"base_channels": 32, "channel_multiplier": [1, 1], "num_res_blocks": 1, "codebook_size": 16},
        },
    ),
    "moss_transcribe_diarize": PictureModel(
        lambda: {
            "text_config": text("qwen3"),
            "audio_config": {
                "d_model": 32,
                "encoder_layers": 1,
                "encoder_attention_heads": 2,
                "encoder_ffn_dim": 32,
            },
        },
    ),
    "gemma4_unified": PictureModel(
        lambda: {
            "text_config": text("gemma4_unified_text"),
            "image_token_id": IMAGE,
            "audio_token_id": IMAGE - 1,
            "video_token_id": IMAGE - 2,
        },
    ),
}
