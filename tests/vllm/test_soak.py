"""Many requests of all kinds at once, some of them bad: each of the others gets the tokens that it gets alone."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from engines import Engine, engine, random_prompts
from test_failures import BAD, CONFIG, Failing
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import RequestOutputKind

AT_ONCE = 12
REFUSED = ["1e1000000000", "9" * 5000, "of", -1, "1B", 7.5, [0.5], 3]


@dataclass(frozen=True)
class Kind:
    prompt: list[int]
    parameters: dict[str, Any]

    def sampling(self, **changes: Any) -> SamplingParams:
        kind = RequestOutputKind.FINAL_ONLY
        return SamplingParams(**{**self.parameters, **changes}, ignore_eos=True, output_kind=kind)


def kinds(draw: random.Random) -> list[Kind]:
    """Of all lengths and budgets, greedy and seeded; some begin alike. In one of ten the scores fail."""
    shared = random_prompts([300], seed=9)[0]
    made = []
    for number in range(30):
        length = BAD if number % 10 == 0 else draw.choice([n for n in range(30, 450) if n != BAD])
        own = random_prompts([length], seed=100 + number)[0]
        begun = draw.choice([0, 0, 64, 150]) % length
        parameters: dict[str, Any] = {"temperature": draw.choice([0, 1.0]), "max_tokens": draw.randint(1, 40)}
        if parameters["temperature"]:
            parameters |= {"seed": draw.randint(0, 2**31), "n": draw.choice([1, 1, 3])}
        if (asked := draw.choice(["on", "on", "off", 0.1, 64])) != "on":
            parameters["extra_args"] = {"crushkv": asked}
        made.append(Kind(shared[:begun] + own[begun:], parameters))
    return made


def step(e: Engine) -> dict[str, list[list[int]]]:
    """One step; all samples of the requests that end with it."""
    ended = [output for output in e.llm.llm_engine.step() if output.finished]
    e.check_blocks()
    return {
        output.request_id: [
            list(sample.token_ids) for sample in sorted(output.outputs, key=lambda sample: sample.index)
        ]
        for output in ended
    }


@pytest.mark.parametrize("caching", [False, True], ids=["no prefix caching", "prefix caching"])
def test_soak(small: Path, caching: bool, request: pytest.FixtureRequest) -> None:
    assert Failing.name == "failing"
    draw = random.Random(1 + caching)
    options = {"max_num_batched_tokens": 128, "num_gpu_blocks_override": 48, "max_model_len": 640}
    with engine(
        small, {**CONFIG, "policy": "failing"}, skip_tokenizer_init=True, enable_prefix_caching=caching, **options
    ) as e:
        vllm = e.llm.llm_engine
        known = kinds(draw)
        alone = []
        for number, kind in enumerate(known):
            vllm.add_request(f"alone{number}", {"prompt_token_ids": kind.prompt}, kind.sampling())
            answer: dict[str, list[list[int]]] = {}
            while not answer:
                answer = step(e)
            alone.append(answer[f"alone{number}"])
            assert e.scheduler.reset_prefix_cache()

        running: dict[str, int] = {}
        asked = answered = aborted = refused = 0
        deadline = time.monotonic() + request.config.getoption("--soak-seconds")
        while running or time.monotonic() < deadline:
            if time.monotonic() < deadline and len(running) < AT_ONCE and draw.random() < 0.5:
                number = draw.randrange(len(known))
                asked += 1
                if draw.random() < 0.1:
                    bad = known[number].sampling(extra_args={"crushkv": draw.choice(REFUSED)})
                    with pytest.raises(VLLMValidationError, match="vllm_xargs"):
                        vllm.add_request(f"bad{asked}", {"prompt_token_ids": known[number].prompt}, bad)
                    refused += 1
                else:
                    vllm.add_request(f"r{asked}", {"prompt_token_ids": known[number].prompt}, known[number].sampling())
                    running[f"r{asked}"] = number
            if running and draw.random() < 0.02:
                name = draw.choice(sorted(running))
                vllm.abort_request([name])
                del running[name]
                aborted += 1
            for name, samples in step(e).items():
                assert samples == alone[running.pop(name)]
                answered += 1
        assert answered > 20 and aborted and refused
        e.check_empty()
