"""Offline inference with vLLM: the plugin is installed with crushkv, and this one option switches it on."""

from vllm import LLM, SamplingParams

from crushkv.demo import load_questions
from crushkv.embedded import embedded_model_path

if __name__ == "__main__":  # vLLM starts processes, which import this file
    llm = LLM(
        str(embedded_model_path()),
        block_size=32,
        max_model_len=8192,
        enforce_eager=True,
        additional_config={"crushkv": {"budget": 0.25}},
    )
    for question in load_questions(2):
        (result,) = llm.chat(
            [{"role": "user", "content": question.prompt}], SamplingParams(max_tokens=32, temperature=0)
        )
        print(f"{question.question} {result.outputs[0].text.strip()}")
