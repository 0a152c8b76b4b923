"""What is lost when a document is compressed before its questions are known (`crushkv build`).

The bundled questions over 7,000 characters around each answer: mean negative log-likelihood of the gold answer behind
the question, in nats a token, with half of the cache of the document, or with all of it in fewer bits.

    python benchmarks/accuracy/blind.py
"""

from __future__ import annotations

import json
from importlib import resources
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from crushkv.embedded import embedded_model_path
from crushkv.evaluation import parse_configurations
from crushkv.evaluation.fidelity import continuation_logits
from crushkv.evaluation.recording import Recording
from crushkv.prompts import Frame, frame

CONFIGURATIONS = (
    "full",
    "{expected_attention,h2o,snapkv,key_diff,key_norm,streaming_llm,random}:budget=0.5,page_size={1,16}",
    "expected_attention:budget=1.0,bits={8,4,3,3/2,2}",
)
AROUND = 3500  # characters before the answer


def gold_nll(model: Any, tokenizer: Any, document: str, question: dict[str, str]) -> dict[str, float]:
    """Of one question, by configuration."""
    framed = frame(tokenizer, document, None, None)
    recording = Recording(model, framed.document_ids(tokenizer))
    asked = Frame.question_ids(tokenizer, question["question"], framed.after)[0]
    gold = tokenizer(question["answer"], add_special_tokens=False, return_tensors="pt").input_ids[0]
    result = {}
    for name, config in parse_configurations(CONFIGURATIONS).items():
        with torch.no_grad():
            (logits,) = continuation_logits(model, recording.branch(config), [torch.cat([asked, gold])])
        result[name] = float(torch.nn.functional.cross_entropy(logits[len(asked) - 1 :], gold))
    return result


def main() -> None:
    path = embedded_model_path()
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    demo = resources.files("crushkv") / "demo"
    document = (demo / "document.txt").read_text(encoding="utf-8")
    questions = json.loads((demo / "questions.json").read_text(encoding="utf-8"))["questions"]
    found = []
    for question in questions:
        start = max(0, document.find(question["answer"]) - AROUND)
        found.append(gold_nll(model, tokenizer, document[start : start + 2 * AROUND], question))
    for name in found[0]:
        values = [result[name] for result in found]
        print(f"{name:45} {sum(values) / len(values):6.2f}   {' '.join(f'{value:6.2f}' for value in values)}")


if __name__ == "__main__":
    main()
