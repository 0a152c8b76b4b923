"""docs/models.md, made from the matrix of models: `python tests/model_page.py` writes it anew."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import transformers
from transformers.cache_utils import DynamicSlidingWindowLayer, LinearAttentionLayer
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from crushkv.hf.left_alone import CrossAttentionLayer, DummyLayer
from crushkv.hf.support import cache_layers
from model_zoo import TEXT, Model, small_config
from picture_models import PICTURES, picture_config

PAGE = Path(__file__).parents[1] / "docs" / "models.md"
LEFT_ALONE = {
    DynamicSlidingWindowLayer: "sliding windows",
    LinearAttentionLayer: "recurrent states",
    DummyLayer: "layers that hold nothing",
    CrossAttentionLayer: "cross-attention",
}


def page() -> str:
    read = {kind: model for kind, model in TEXT.items() if kind in CONFIG_MAPPING}
    seen = {kind: model.expected for kind, model in PICTURES.items() if kind in CONFIG_MAPPING}
    refused = {kind: model for kind, model in (read | seen).items() if model.refused}
    broken = sorted(kind for kind, model in (read | seen).items() if model.broken)
    texts = {kind: model for kind, model in read.items() if kind not in refused and kind not in broken}
    pictures = {kind: model for kind, model in seen.items() if kind not in refused and kind not in broken}
    lines = [
        "# Models",
        "",
        "This page is made from the tests (`python tests/model_page.py`); what it says is what they show.",
        f"It covers every model type of `AutoModelForCausalLM` in Transformers {transformers.__version__}, and the",
        "common ones that read pictures.",
        "",
        "Each model is a tiny one with random weights, of the model's own configuration class. *Compressed* means, for",
        "a batch with left padding, over two turns, with `sdpa` and with `eager` attention:",
        "",
        "- a budget of 1.0 gives the tokens and logits of the full cache;",
        "- with a small budget the logits are those of the full cache in which the evicted tokens are masked, head by",
        "  head;",
        "- every layer whose cache grows with the text has really dropped tokens;",
        "- the attention mass that the policies are shown is the sum of the model's own attention weights;",
        "- 8 bits for every token stay near the full cache, and the preset `small` runs.",
        "",
        "Layers that do not grow with the text are left to Transformers: sliding windows, recurrent states, keys and",
        "values of pictures. So are layers that hold nothing: they attend to another layer's keys, or not at all.",
        "",
        f"## Compressed: {len(texts)} model types",
        "",
        "| model type | class | left alone | few bits |",
        "|---|---|---|---|",
        *(_row(kind, small_config(kind, model.fields), model) for kind, model in sorted(texts.items())),
        "",
        f"## Compressed, with a picture: {len(pictures)} model types",
        "",
        "| model type | class | left alone | few bits |",
        "|---|---|---|---|",
        *(_row(kind, picture_config(kind), model) for kind, model in sorted(pictures.items())),
        "",
        f"## Refused: {len(refused)} model types",
        "",
        "KVCrush says so, with the reason, when a block is entered or a cache is made.",
        "",
        "| reason | model types |",
        "|---|---|",
        *(f"| {reason} | {', '.join(kinds)} |" for reason, kinds in _by_reason(refused).items()),
        "",
        "Encoder-decoder models are refused, too.",
        "",
        "## Not shown",
        "",
        f"Transformers {transformers.__version__} itself cannot build these from the configuration of that name, or",
        f"fails at the first prompt: {', '.join(broken)}.",
    ]
    return "\n".join(lines) + "\n"


def _row(kind: str, config: Any, model: Model) -> str:
    names = (MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    found = next(mapping[kind] for mapping in names if kind in mapping)
    kinds = {type(layer) for layer in cache_layers(_as_decoder(config))}
    left = [name for layer, name in LEFT_ALONE.items() if layer in kinds]
    return f"| {kind} | `{found}` | {', '.join(left)} | {'no: latent attention (MLA)' if model.few_bits else 'yes'} |"


def _as_decoder(config: Any) -> Any:
    """Classes for causal language models of encoder-decoder families are decoders alone."""
    config.is_encoder_decoder = False
    return config


def _by_reason(refused: dict[str, Model]) -> dict[str, list[str]]:
    result = defaultdict(list)
    for kind, model in sorted(refused.items()):
        result[model.refused].append(kind)
    return dict(sorted(result.items(), key=lambda item: -len(item[1])))


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
