"""A chat over several turns on one cache: each turn reads only what is new."""

import torch

from crushkv import KVCrush, load_embedded
from crushkv.demo import document

model, tokenizer = load_embedded()
cache = KVCrush("balanced", min_tokens=0).cache(model)  # it holds the chat so far, and is compressed after each prompt
messages: list[dict[str, str]] = []
ids = torch.empty(1, 0, dtype=torch.long)  # all tokens of the chat so far
seen = ""  # their text

for question in (f"{document()[:2500]}\n\nWho speaks in this text?", "Where does it take place?", "Thank you!"):
    messages.append({"role": "user", "content": question})
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    new = tokenizer(text.removeprefix(seen), add_special_tokens=False, return_tensors="pt").input_ids
    prompt = torch.cat([ids, new], dim=1)
    ids = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        past_key_values=cache,
        max_new_tokens=30,
        do_sample=False,
    )
    if ids[0, -1] == tokenizer.eos_token_id:
        ids = ids[:, :-1]  # the template writes the end of a message itself
    answer = tokenizer.decode(ids[0, prompt.shape[1] :])
    messages.append({"role": "assistant", "content": answer})
    seen = text + answer
    print(f"{new.shape[1]} new tokens. {answer.strip()}")

print(cache.report())
