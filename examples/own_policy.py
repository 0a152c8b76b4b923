"""A policy of one's own: tokens with large values are important."""

from dataclasses import dataclass

from torch import Tensor

from crushkv import KVCrush, load_embedded
from crushkv.demo import document
from crushkv.importance import LayerView, Policy, register


@register
@dataclass(frozen=True)
class ValueNorm(Policy):
    """Scores a token by the length of its value."""

    name = "value_norm"
    paper = "none"

    def score(self, view: LayerView) -> Tensor:
        """Importance, `[B, Hkv, S]`, from the values `[B, Hkv, S, D]`."""
        return view.values.float().norm(dim=-1)


model, tokenizer = load_embedded()
inputs = tokenizer(document()[:3000], return_tensors="pt")
with KVCrush(policy="value_norm", budget=0.5)(model) as session:
    output = model.generate(**inputs, max_new_tokens=20, do_sample=False)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :]))
print(session.cache.report())
