"""Tiny random models of real configuration classes: one line a model, and what is expected of it.

`TEXT` has a line for every model type of Transformers' `MODEL_FOR_CAUSAL_LM_MAPPING`, `PICTURES` (in
`picture_models.py`) one for each wrapper that reads a picture, too.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from crushkv.text import release

VOCAB = 128
# What a configuration class has a field for is set; each class has some of these.
SMALL: dict[str, Any] = {
    "vocab_size": VOCAB,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "initializer_range": 0.3,  # attention that prefers some tokens to others
    "init_std": 0.3,
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_target_positions"), 512),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "embedding_size", "emb_dim"), 64),
    **dict.fromkeys(("intermediate_size", "decoder_ffn_dim", "encoder_ffn_dim", "ffn_dim", "dff"), 64),
    **dict.fromkeys(("num_hidden_layers", "decoder_layers", "encoder_layers", "n_layer", "n_layers", "num_layers"), 4),
    **dict.fromkeys(("num_attention_heads", "decoder_attention_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("n_head", "n_heads", "num_heads", "attention_heads"), 4),
    "num_key_value_heads": 2,
    "head_dim": 16,
    "sliding_window": 16,
    # Experts
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk"), 2),
    **dict.fromkeys(("n_group", "topk_group"), 1),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size"), 32),
    # Latent attention, and indices that choose tokens
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 12,
    "index_head_dim": 16,
    "index_topk": 32,
    "index_n_heads": 2,
    "attention_chunk_size": 16,
    # Recurrent layers
    "mamba_d_state": 8,
    "mamba_n_heads": 4,
    "mamba_d_head": 32,
    "mamba_chunk_size": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
FULL: dict[str, Any] = {"sliding_window": None}
SLIDING: dict[str, Any] = {"layer_types": ["sliding_attention", "full_attention"] * 2}
RECURRENT: dict[str, Any] = {"layer_types": ["linear_attention", "full_attention"] * 2}
CONVOLUTION: dict[str, Any] = {"layer_types": ["conv", "full_attention"] * 2}
LATENT: dict[str, Any] = {"num_key_value_heads": 4, "head_dim": 8}
DECODER: dict[str, Any] = {"is_decoder": True}
EAGER: dict[str, Any] = {"attn_implementation": "eager"}  # with sdpa, Transformers 5.16 leaves soft-capping out
ROPE: dict[str, Any] = {"rope_type": "default", "rope_theta": 1e4}
QSA: dict[str, Any] = {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 256, "hc_lowrank": 8} | {
    "indexer_budget": 32,
    "indexer_compress_ratio": 4,
}
SHARED: dict[str, Any] = {
    "num_hidden_layers": 6,
    "layer_types": ["sliding_attention", "full_attention"] * 3,
    "num_kv_shared_layers": 2,
    "vocab_size_per_layer_input": VOCAB,
    "hidden_size_per_layer_input": 8,
}


ASSISTANT: dict[str, Any] = {
    **{"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16},
    **{"num_hidden_layers": 4, "num_kv_shared_layers": 4, "vocab_size": VOCAB, "vocab_size_per_layer_input": 0},
    **{"hidden_size_per_layer_input": 0, **SLIDING},
}


@dataclass(frozen=True)
class Model:
    """What to build and what to expect.

    Attributes:
        fields: of the configuration, over those of `SMALL`.
        refused: part of the reason that KVCrush gives when its cache is made; empty: the model is compressed.
        few_bits: the same for configurations of few bits.
        broken: part of the error that Transformers itself raises with its own cache; empty: none.
    """

    fields: dict[str, Any] = field(default_factory=dict)
    refused: str = ""
    few_bits: str = ""
    broken: str = ""


def works(*parts: dict[str, Any], **fields: Any) -> Model:
    return Model(_merged(parts, fields))


def latent(*parts: dict[str, Any], **fields: Any) -> Model:
    return Model(_merged((LATENT, *parts), fields), few_bits=r"\(MLA\) caches a latent")


def refused(reason: str, *parts: dict[str, Any], **fields: Any) -> Model:
    return Model(_merged(parts, fields), refused=reason)


def broken(error: str, *parts: dict[str, Any], **fields: Any) -> Model:
    return Model(_merged(parts, fields), broken=error)


def since(version: tuple[int, int], now: Model, before: Model) -> Model:
    """What is expected of the installed release of Transformers: releases before `version` are otherwise."""
    return now if release(transformers.__version__) >= version else before


def _merged(parts: tuple[dict[str, Any], ...], fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value for part in (*parts, fields) for name, value in part.items()}


ITSELF = "computes its attention by itself"
INDEXED = "chooses the tokens that it attends to by an index of its own"
BOTH = "holds a recurrent state and keys and values in one"
UNKNOWN = "is of a kind that crushkv does not know"
NO_ATTENTION = "the model has no attention layers"
NO_CACHE = "takes no cache of Transformers"
OTHERS = "every layer attends to the keys and values of another model"
# A configuration with no layer that caches was an error in Transformers, for some releases.
ASSISTS = since(
    (5, 24),
    refused(OTHERS, text_config=ASSISTANT),
    since(
        (5, 17),
        broken("layer types producing a cache is different", text_config=ASSISTANT),
        refused(OTHERS, text_config=ASSISTANT),
    ),
)

TEXT: dict[str, Model] = {
    "afmoe": works(),
    "apertus": works(),
    "apertus1p5_text": works(rope_parameters=ROPE),
    "arcee": works(),
    "aria_text": works(),
    "axk1": latent(),
    "axk2": refused(INDEXED, LATENT),
    "bailing_hybrid": latent(RECURRENT),
    "bamba": works(attn_layer_indices=[1, 3]),
    "bart": works(),
    "beam": works(),
    "bert": works(DECODER),
    "bert-generation": works(DECODER),
    "big_bird": refused("attends to blocks that it chooses", DECODER),
    "bigbird_pegasus": works(),
    "biogpt": works(),
    "blt": refused("Transformers has no dynamic cache for this model"),
    "bitnet": works(),
    "blenderbot": works(),
    "blenderbot-small": works(),
    "bloom": refused(ITSELF),
    "camembert": works(DECODER),
    "codegen": since((5, 24), works(rotary_dim=8), refused(ITSELF, rotary_dim=8)),
    "cohere": works(),
    "cohere2": works(SLIDING),
    "cohere2_moe": works(SLIDING),
    "ctrl": works(),
    "cwm": works(SLIDING),
    "data2vec-text": works(DECODER),
    "deepseek_v2": latent(),
    "deepseek_v3": latent(),
    "deepseek_v32": refused(INDEXED, LATENT),
    "deepseek_v4": refused(UNKNOWN),
    "diffllama": refused("each layer attends twice"),
    "doge": refused(ITSELF, FULL),
    "dory": works(SLIDING, n_input_layers=1, n_output_layers=1),
    "dots1": works(n_shared_experts=1),
    "electra": works(DECODER),
    "ernie": works(DECODER),
    "ernie4_5": works(),
    "ernie4_5_moe": works(),
    "exaone": works(),
    "exaone4": works(SLIDING),
    "exaone_moe": works(SLIDING),
    "falcon": refused(ITSELF),
    "falcon_h1": refused(BOTH, mamba_d_ssm=64, mamba_d_head=16),
    "falcon_mamba": refused(NO_ATTENTION),
    "flex_olmo": works(),
    "flint": works(),
    "gemma": works(),
    "gemma2": works(EAGER),
    "gemma3_text": works(SLIDING),
    "gemma3n_text": works(SHARED, laurel_rank=8, activation_sparsity_pattern=[0.0] * 6, intermediate_size=[64] * 6),
    "gemma4_text": works(SHARED, global_head_dim=32),
    "gemma4_unified_text": works(SLIDING),
    "glm": works(),
    "glm4": works(),
    "glm4_moe": works(),
    "glm4_moe_lite": latent(),
    "glm_moe_dsa": refused(INDEXED, LATENT),
    "gpt-sw3": works(),
    "gpt2": works(),
    "gpt_bigcode": works(),
    "gpt_neo": refused(ITSELF, attention_types=[[["global", "local"], 2]]),
    "gpt_neox": works(),
    "gpt_neox_japanese": refused(ITSELF),
    "gpt_oss": works(SLIDING),
    "gptj": since((5, 24), works(rotary_dim=8), refused(ITSELF, rotary_dim=8)),
    "granite": works(),
    "granite_swa": works(SLIDING),
    "granitemoe": works(),
    "granitemoe_swa": works(SLIDING),
    "granitemoehybrid": works(RECURRENT),
    "granitemoeshared": works(),
    "helium": works(),
    "hrm_text": works(initializer_range=0.1),  # above that, its cycles multiply rounding errors without bound
    "hunyuan_v1_dense": works(),
    "hunyuan_v1_moe": works(),
    "hy_v3": works(),
    "hy_v4": refused(INDEXED, LATENT),
    "hyperclovax": works(),
    "internlm3": works(),
    "iquestcoder": works(),
    "jais2": works(),
    "jamba": works(attn_layer_period=2, attn_layer_offset=1, mamba_dt_rank=8),
    "jetmoe": refused("each layer repeats its keys once for each chosen expert"),
    "kimi_linear": latent(RECURRENT, linear_head_dim=16, linear_num_heads=4),
    "kolibri1": works(SLIDING),
    "laguna": works(),
    "lara_mini": works(),
    "lfm2": works(CONVOLUTION, block_multiple_of=16),
    "lfm2_moe": works(CONVOLUTION),
    "lfm3": works(layer_types=["conv", "sliding_attention", "full_attention", "full_attention"]),
    "llama": works(),
    "llama4_text": works(),
    "longcat_flash": latent(ffn_hidden_size=64, expert_ffn_hidden_size=32, zero_expert_num=2),
    "mamba": refused(NO_ATTENTION),
    "mamba2": refused(NO_ATTENTION, num_heads=8, head_dim=16, n_groups=2),
    "marian": works(),
    "mbart": works(),
    "megatron-bert": refused(ITSELF, DECODER),
    "mellum": works(SLIDING),
    "mimo_v2_flash": works(SLIDING),
    "minicpm3": latent(),
    "minimax": refused("accepts no cache but its own", RECURRENT),
    "minimax_m2": works(),
    "ministral": works(SLIDING),
    "ministral3": works(FULL),
    "mistral": works(FULL),
    "mixtral": works(FULL),
    "modernbert-decoder": works(SLIDING),
    "mpt": refused(ITSELF),
    "mvp": refused(ITSELF),
    "nanochat": works(),
    "nemotron": works(),
    "olmo": works(),
    "olmo2": works(),
    "olmo3": works(SLIDING),
    "olmo_hybrid": works(RECURRENT),
    "olmoe": works(),
    "openai-gpt": refused(NO_CACHE),
    "opt": works(),
    "pegasus": works(),
    "persimmon": works(),
    "phi": works(),
    "phi3": works(FULL),
    "phimoe": works(FULL),
    "plbart": works(),
    "prophetnet": refused(ITSELF),
    "qwen2": works(),
    "qwen2_moe": works(),
    "qwen3": works(),
    "qwen3_5_moe_text": works(RECURRENT),
    "qwen3_5_text": works(RECURRENT),
    "qwen3_moe": works(),
    "qwen3_next": works(RECURRENT),
    "recurrent_gemma": refused("every layer that attends has a sliding window"),
    "rembert": refused(ITSELF, DECODER),
    "roberta": works(DECODER),
    "roberta-prelayernorm": works(DECODER),
    "roformer": refused(ITSELF, DECODER),
    "rwkv": refused(NO_CACHE),
    "sarvam_mla": latent(),
    "sarvam_moe": works(),
    "seed_oss": works(),
    "smollm3": works(),
    "solar_open": works(),
    "stablelm": works(),
    "starcoder2": works(FULL),
    "trocr": refused(ITSELF),
    "vaultgemma": works(SLIDING, EAGER),
    "whisper": works(max_source_positions=64),
    "xglm": refused(ITSELF),
    "xlm": refused(NO_CACHE),
    "xlm-roberta": works(DECODER),
    "xlm-roberta-xl": works(DECODER),
    "xlnet": refused(NO_CACHE),
    "xmod": works(DECODER, default_language="en_XX"),
    "youtu": latent(),
    "xlstm": refused(NO_CACHE),
    "zamba": refused(BOTH, num_hidden_layers=6, attn_layer_period=3, attn_layer_offset=2),
    "zamba2": refused(BOTH, layers_block_type=["mamba", "hybrid"] * 2),
    "zaya": refused(BOTH, num_experts_per_tok=1),
    "cohere_compass_text": works(SLIDING, rope_parameters={"sliding_attention": ROPE, "full_attention": ROPE}),
    "cpmant": refused(ITSELF, dim_head=16, dim_ff=64, prompt_types=4, segment_types=4, prompt_length=4),
    "dots3_note": refused(INDEXED),
    "dots3_note_text": refused(INDEXED, LATENT, layer_types=["indexed_attention"] * 4),
    "gemma3n": broken("requires the timm library"),
    "gemma4_assistant": ASSISTS,
    "gemma4_unified_assistant": ASSISTS,
    "inkling_text": refused(BOTH),
    "inkling2_text": refused(BOTH),
    "inkling2_loop_text": refused(BOTH),
    "minimax_m3_vl_text": refused(UNKNOWN, layer_types=["full_attention", "minimax_m3_sparse"] * 2),
    "musicgen": broken("no attribute 'dropout'|field 'text_encoder'"),
    "musicgen_melody": broken("no attribute 'dropout'|field 'text_encoder'"),
    "qwen4_exp": refused(INDEXED, text_config={"num_hidden_layers": 4, **RECURRENT, **QSA}),
    "qwen4_exp_text": refused(INDEXED, QSA, RECURRENT),
    "dbrx": works(
        attn_config={"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 1e4},
        ffn_config={"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
    ),
    "moshi": works(sliding_window=512),
    "nemotron_h": works(
        layer_types=["linear_attention", "full_attention", "mlp", "full_attention"],
        mamba_num_heads=4,
        mamba_head_dim=16,
        n_groups=2,
        ssm_state_size=8,
        moe_shared_expert_intermediate_size=32,
        chunk_size=16,
    ),
    "reformer": refused(
        NO_CACHE,
        DECODER,
        attn_layers=["local", "lsh"],
        axial_pos_shape=(16, 32),
        axial_pos_embds_dim=(32, 32),
        feed_forward_size=64,
    ),
    "roc_bert": works(
        DECODER,
        pronunciation_vocab_size=32,
        shape_vocab_size=32,
        pronunciation_embed_dim=16,
        shape_embed_dim=16,
    ),
}


def small_config(kind: str, fields: dict[str, Any]) -> Any:
    """A tiny configuration of a model type."""
    cls = CONFIG_MAPPING[kind]
    known = {field.name for field in dataclasses.fields(cls)}
    return cls(**{name: value for name, value in SMALL.items() if name in known} | fields)


def build(kind: str) -> Any:
    """The tiny model, with the same random weights each time; without weights where it is only to be refused."""
    torch.manual_seed(0)
    with torch.device("meta" if TEXT[kind].refused else "cpu"):
        return AutoModelForCausalLM.from_config(small_config(kind, TEXT[kind].fields)).eval()
