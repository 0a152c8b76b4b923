"""A plain decoder that follows an answer behind given keys and values, and the prompts that `record.py` reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from crushkv.embedded import embedded_model_path
from crushkv.storage.quantization import dequantize, narrowed, quantize
from crushkv.storage.rotation import rotation


@dataclass(frozen=True)
class Held:
    """What a cache holds of a prompt: entries of every layer and KV head, and what is added to their logits.

    keys, values: `[L, Hkv, P, D]`. bias: `[L, Hkv, P]`, -inf where there is no entry. nbytes: at 16 bits a number.
    """

    keys: Tensor
    values: Tensor
    bias: Tensor
    nbytes: float


class Prompt:
    """One recorded prompt, and what several variants need of it."""

    def __init__(self, found: dict[str, Tensor]) -> None:
        self.keys, self.values, self.queries = found["keys"], found["values"], found["queries"]
        self.query_square, self.answer, self.logits = found["query_square"], found["answer"], found["logits"]
        self.layers, self.kv_heads, self.tokens, self.size = self.keys.shape
        self.heads = self.queries.shape[1]
        self.group = self.heads // self.kv_heads
        self._attention: dict[int, Tensor] = {}
        self._rounded: dict[tuple[str, int, str], Tensor] = {}

    @classmethod
    def read(cls, path: Path) -> Prompt:
        return cls(torch.load(path))

    def attention(self, queries: int) -> Tensor:
        """Causal attention of the last queries, `[L, Hq, queries, S]`."""
        if queries not in self._attention:
            q = self.queries[:, :, -queries:].unflatten(1, (self.kv_heads, self.group))
            logits = (q @ self.keys[:, :, None].transpose(-1, -2)).flatten(1, 2) * self.size**-0.5
            future = torch.ones(queries, queries, dtype=torch.bool).triu(1)
            logits[..., -queries:].masked_fill_(future, -torch.inf)
            self._attention[queries] = logits.softmax(-1)
        return self._attention[queries]

    @cached_property
    def key_scale(self) -> Tensor:
        """Factors of the channels that make the error of a logit least, `[L, Hkv, 1, D]`: sqrt(rms(q) / rms(k))."""
        q = self.query_square.unflatten(1, (self.kv_heads, self.group)).mean(2)
        k = (self.keys - self.keys.mean(2, keepdim=True)).square().mean(2)
        return (q / k.clamp(min=1e-8)).clamp(min=1e-8).pow(0.25)[:, :, None].half().float()

    def rounded(self, which: str, bits: int, scaling: str = "none") -> Tensor:
        """All keys or values as a tier of so many bits gives them back."""
        x = self.keys if which == "keys" else self.values
        if bits == 16:
            return x
        key = which, bits, scaling if which == "keys" else "none"
        if key not in self._rounded:
            self._rounded[key] = round_to(x, bits, which == "keys", self.key_scale if key[2] == "query" else None)
        return self._rounded[key]


def round_to(x: Tensor, bits: int, centred: bool, scale: Tensor | None = None) -> Tensor:
    """`x [..., P, D]` as `crushkv.storage` gives it back, its channels multiplied by `scale` before it is rotated."""
    matrix = rotation(x.shape[-1], x.device)
    mean = x.mean(-2, keepdim=True) if centred else torch.zeros(())
    centre = x - mean
    codes = quantize((centre if scale is None else centre * scale) @ matrix, 64)
    out = torch.empty_like(x)
    dequantize(narrowed(codes.codes, bits), codes.zero, codes.span, bits, out)
    out = out @ matrix.T
    return (out if scale is None else out / scale) + mean


class Follower:
    """Logits along an answer: the forward pass of Llama and Qwen2, written out, with a bias for each entry of a cache.

    model: one of these, in float32; None: the embedded one.
    """

    def __init__(self, model: Any = None) -> None:
        if model is None:
            model = AutoModelForCausalLM.from_pretrained(embedded_model_path(), dtype=torch.float32).eval()
        self.model, self.config = model.model, model.config
        self.head = model.lm_head

    @torch.no_grad()
    def kl(self, prompt: Prompt, held: Sequence[Held]) -> list[float]:
        """Mean KL divergence of each cache to the full one along the full cache's own answer, in nats."""
        given = self.logits(prompt, held).log_softmax(-1)
        target = prompt.logits.log_softmax(-1)
        return [float(kl) for kl in (target.exp() * (target - given)).sum(-1).mean(-1)]

    def logits(self, prompt: Prompt, held: Sequence[Held]) -> Tensor:
        """`[caches, n - 1, V]`: all caches in one pass."""
        ids = prompt.answer[:-1]
        rows, new, size, kv_heads = len(held), len(ids), prompt.size, prompt.kv_heads
        positions = torch.arange(prompt.tokens, prompt.tokens + new)[None]
        x = self.model.embed_tokens(ids).expand(rows, new, -1)
        cos, sin = (part[0] for part in self.model.rotary_emb(x, positions))
        future = torch.full((new, new), -torch.inf).triu(1)

        def turned(part: Tensor) -> Tensor:
            first, second = part.chunk(2, dim=-1)
            return part * cos + torch.cat([-second, first], dim=-1) * sin

        for index, layer in enumerate(self.model.layers):
            y = layer.input_layernorm(x)
            attention = layer.self_attn
            q, k, v = (
                project(y).view(rows, new, -1, size).transpose(1, 2)
                for project in (attention.q_proj, attention.k_proj, attention.v_proj)
            )
            q, k = turned(q).reshape(rows, kv_heads, -1, size) * size**-0.5, turned(k)
            own = ((q @ k.transpose(-1, -2)).view(rows, kv_heads, -1, new, new) + future).flatten(2, 3)
            attended = []
            for row, cache in enumerate(held):
                past = (q[row] @ cache.keys[index].transpose(-1, -2)) + cache.bias[index][:, None]
                weights = torch.cat([past, own[row]], dim=-1).softmax(-1)
                width = past.shape[-1]
                output = weights[..., :width] @ cache.values[index] + weights[..., width:] @ v[row]
                attended.append(output.reshape(-1, new, size).transpose(0, 1).reshape(new, -1))
            x = x + attention.o_proj(torch.stack(attended))
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        return self.head(self.model.norm(x)).float()
