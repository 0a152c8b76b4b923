"""Reads a document once, keeps its cache as a file, and answers several questions from it."""

import tempfile
from pathlib import Path

import torch

from crushkv import KVCrush, load_cache, load_embedded, save_cache
from crushkv.demo import document
from crushkv.prompts import frame

model, tokenizer = load_embedded()
framed = frame(tokenizer, document()[:3000])  # the prompt in two parts: the document, and a question to come
read = framed.document_ids(tokenizer)

# The questions are not known yet, so every token is kept, in 8 bits.
cache = KVCrush(budget=1.0, bits=8, min_tokens=0).cache(model)
with torch.no_grad():
    model(input_ids=read, past_key_values=cache, logits_to_keep=1)
file = Path(tempfile.mkdtemp()) / "document.safetensors"
save_cache(file, cache, model, read)
print(cache.report())

saved = load_cache(file, model)  # usually in another process
for question in ("Who wrote this text?", "What is it about?"):
    ids = torch.cat([saved.input_ids, framed.question_ids(tokenizer, question, framed.after)], dim=1)
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=saved.cache(),  # a new one for each question
        max_new_tokens=30,
        do_sample=False,
    )
    print(f"{question} {tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True).strip()}")
