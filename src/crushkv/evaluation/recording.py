"""A prompt read once with the full cache, from which caches of any configuration are made."""

from __future__ import annotations

import copy
import json

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from ..config import CrushConfig
from ..hf.cache import CrushCache
from ..hf.head_group import AttentionCall
from ..hf.layer import CrushLayer
from ..prompts import read_prompt


class Recording:
    """Reads one prompt and keeps the full cache and every layer's queries, to replay them to other caches.

    During a prompt KVCrush evicts a layer's tokens only after that layer has attended to all of them, so what a
    layer is given does not depend on the configuration. A cache made by `branch` is therefore the cache that
    reading the prompt with that configuration leaves, at the cost of its selection alone.

    Holds the full cache and the queries of all tokens: (Hq + 2 Hkv) / (2 Hkv) times the full cache.

    Args:
        model: the model; nothing on it is changed.
        input_ids: int64 `[1, S]`.
        chunk: read the prompt in pieces of so many tokens; None: in one.

    Attributes:
        model: as given.
        logits: float32 `[V]`, of the token that follows the prompt: the same for every branch.
        tokens: S.
    """

    def __init__(self, model: PreTrainedModel, input_ids: Tensor, chunk: int | None = None) -> None:
        if input_ids.ndim != 2 or input_ids.shape[0] != 1 or not input_ids.shape[1]:
            raise ValueError(f"input_ids of shape {tuple(input_ids.shape)}: expected [1, tokens]")
        self.model = model
        self._source = _RecordingCache(model)
        self.logits: Tensor = read_prompt(model, input_ids, self._source, chunk)[0, -1].float()
        self.tokens: int = input_ids.shape[1]
        self._masses: dict[str, list[Tensor]] = {}

    @property
    def nbytes_at_16_bits(self) -> int:
        """Keys and values of the full cache, with two bytes a number, whatever the model's dtype."""
        return self._source.nbytes_at_16_bits

    @torch.no_grad()
    def branch(self, config: CrushConfig | None) -> CrushCache | DynamicCache:
        """The cache after the prompt: of a configuration, or the full cache (None). Each call makes a new one."""
        if config is None:
            return self._full()
        cache = CrushCache(self.model, config)
        policy = cache.plan.evictor.policy
        # Mass is gathered from all queries, which takes a while, and is the same for all that share a policy.
        key = json.dumps([config.policy, config.policy_options, config.window], sort_keys=True, default=str)
        masses = self._masses.setdefault(key, []) if policy.streams else []
        for index, source in enumerate(self._source.layers):
            if not isinstance(source, _RecordingLayer):
                cache.layers[index] = copy.deepcopy(source)
                continue
            layer, keys, values, call = cache.layers[index], source.keys, source.values, source.call
            assert isinstance(layer, CrushLayer) and keys is not None and values is not None and call is not None
            if not layer.index:
                cache.begin(self.tokens, layer)
            layer.update(keys, values)
            if layer.index < len(masses):
                layer.groups[0].mass = masses[layer.index]
            else:
                layer.remember(call, None, reading=True)
                if policy.streams:
                    mass = layer.groups[0].mass
                    assert mass is not None
                    masses.append(mass)
            layer.before_attention(call)
            layer.evict(call)
        return cache

    def _full(self) -> DynamicCache:
        full = DynamicCache(config=self.model.config)
        for index, source in enumerate(self._source.layers):
            if isinstance(source, _RecordingLayer):
                assert source.keys is not None and source.values is not None
                full.update(source.keys, source.values, index)
            else:
                full.layers[index] = copy.deepcopy(source)
        return full


class _RecordingLayer(CrushLayer):
    """Never evicts, and keeps the call that scores would be made from, as one over the whole prompt."""

    call: AttentionCall | None = None

    def before_attention(self, call: AttentionCall) -> None:
        """Nothing is decided."""

    def after_attention(self, call: AttentionCall) -> None:
        queries = call.queries if self.call is None else torch.cat([self.call.queries, call.queries], dim=2)
        self.call = call._replace(queries=queries, mask=None, shown=None)  # one row without padding has nothing to hide


class _RecordingCache(CrushCache):
    layer_class = _RecordingLayer

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model, CrushConfig(budget=1.0, policy="streaming_llm", interval=0))
