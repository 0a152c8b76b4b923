"""Writes an answer while it is made: `generate` runs in a thread, and the main thread reads its streamer."""

from threading import Thread

from transformers import TextIteratorStreamer

from crushkv import KVCrush, load_embedded
from crushkv.demo import document

model, tokenizer = load_embedded()
inputs = tokenizer(document()[:3000], return_tensors="pt")
streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)

with KVCrush("balanced")(model) as session:  # it belongs to the model, so threads that start inside are compressed
    options = {**inputs, "max_new_tokens": 40, "do_sample": False, "streamer": streamer}
    thread = Thread(target=model.generate, kwargs=options)
    thread.start()
    for text in streamer:
        print(text, end="", flush=True)
    thread.join()

print()
print(session.cache.report())
