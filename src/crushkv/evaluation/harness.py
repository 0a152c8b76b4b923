"""`crushkv` as a model of lm-evaluation-harness: the harness's own Hugging Face model, with a compressed cache."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from tqdm import tqdm

from ..config import CrushConfig
from ..config_text import read_field
from ..embedded import embedded_model_path
from ..errors import ConfigError, CrushError
from ..hf import KVCrush
from .fidelity import continuation_logits
from .recording import Recording

EMBEDDED = "embedded"
_FIELDS = frozenset(f.name for f in dataclasses.fields(CrushConfig))


@register_model("crushkv")
class CrushLM(HFLM):
    """Takes the arguments of the harness's `hf` model and the fields of `CrushConfig`.

    Answers are generated with a compressed cache. Likelihoods of given continuations are computed as generation
    would: the context is read and compressed, and the continuation is scored behind it; one context at a time,
    whatever the batch size. A perplexity over rolling windows has no prompt to compress, and is refused.

    Args:
        pretrained: a Hugging Face id, folder or loaded model; `embedded` is the embedded one.
        config: a `CrushConfig`; otherwise its fields among `fields`.
        fields: of `CrushConfig`, as values or as text; all others go to `HFLM`.

    Raises:
        ConfigError: a field's value is not accepted.
    """

    def __init__(self, pretrained: Any = EMBEDDED, config: CrushConfig | None = None, **fields: Any) -> None:
        ours = {
            name: read_field(name, value) if isinstance(value, str) else value
            for name, value in fields.items()
            if name in _FIELDS
        }
        if config is not None and ours:
            raise ConfigError("config: give either a CrushConfig or its fields")
        self.crush_config = CrushConfig.from_dict(ours) if config is None else config
        rest = {name: value for name, value in fields.items() if name not in _FIELDS}
        super().__init__(str(embedded_model_path()) if pretrained == EMBEDDED else pretrained, **rest)

    def _model_generate(self, *args: Any, **kwargs: Any) -> Any:
        with KVCrush(self.crush_config)(self.model):
            return super()._model_generate(*args, **kwargs)

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        """Of each (text, context tokens, continuation tokens): log-likelihood, and whether it is greedy."""
        answers = []
        recording: Recording | None = None
        read: list[int] | None = None
        for request, context, continuation in tqdm(requests, disable=disable_tqdm, desc="loglikelihood"):
            # What does not fit is cut off in front, as the harness does it.
            tokens = context[-(self.max_length - len(continuation)) :] or [self.prefix_token_id]
            if recording is None or tokens != read:  # the choices of a question follow each other
                recording, read = Recording(self.model, torch.tensor([tokens])), tokens
            answer = self._score(recording, torch.tensor(continuation))
            self.cache_hook.add_partial("loglikelihood", request, answer)
            answers.append(answer)
        return answers

    def _score(self, recording: Recording, continuation: torch.Tensor) -> tuple[float, bool]:
        with torch.no_grad():
            cache = recording.branch(self.crush_config)
            (behind,) = continuation_logits(self.model, cache, [continuation])
        logits = torch.cat([recording.logits[None], behind]).log_softmax(-1)
        target = continuation.to(logits.device)
        likelihood = logits.gather(1, target[:, None]).sum()
        return float(likelihood), bool((logits.argmax(-1) == target).all())

    def loglikelihood_rolling(self, *args: Any, **kwargs: Any) -> Any:
        raise CrushError(
            "perplexity over rolling windows reads every text in one pass, so that no cache is used: the model "
            "'crushkv' would only repeat the figures of 'hf'"
        )
