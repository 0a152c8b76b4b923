"""Answers a question about a text with a quarter of the KV cache."""

from crushkv import KVCrush, load_embedded
from crushkv.demo import document

model, tokenizer = load_embedded()  # or AutoModelForCausalLM.from_pretrained(...), and its tokenizer
question = f"{document()[:3000]}\n\nWhat is this text about? Answer in one sentence."
inputs = tokenizer.apply_chat_template(
    [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=True, return_tensors="pt"
)

with KVCrush("balanced")(model) as session:
    output = model.generate(**inputs, max_new_tokens=40, do_sample=False)

print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
print(session.cache.report())
