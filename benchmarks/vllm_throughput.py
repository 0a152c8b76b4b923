"""vLLM alone against vLLM with KVCrush, in the same cache memory: requests at once, throughput, latencies.

    make bench-vllm                                    # or, in an environment with vLLM:
    python benchmarks/vllm_throughput.py --json

The same requests are given all at once to engines whose pools have the same number of blocks, too few for all of them.
Each engine runs in a process of its own. The time to first token where memory is not the limit is measured on single
requests that take turns, with KVCrush and without, in one engine.
"""

from __future__ import annotations

import argparse
import importlib.resources
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

BUDGETS = {"half": 0.5, "quarter": 0.25, "eighth": 0.125}
# Tokens of a prompt, of an answer, and blocks of 32 in the pool.
WORKLOADS = {"long prompts": (768, 48, 128), "short prompts": (128, 320, 70)}
BLOCK = 32
LATENCY_PROMPT = 1024
INTERVAL = 32  # tokens between two evictions while decoding: a request holds its budget and no more than these


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="Hugging Face id or folder; default: the embedded model")
    parser.add_argument("--requests", type=int, default=24, help="of each workload")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--json", action="store_true", help="print one object instead of tables")
    parser.add_argument("--run", help=argparse.SUPPRESS)  # one engine: a job as JSON
    arguments = parser.parse_args()
    if arguments.run:
        print(json.dumps(run(json.loads(arguments.run))))
        return
    if arguments.model is None:
        from crushkv.embedded import embedded_model_path

        arguments.model = str(embedded_model_path())
    result = compare(arguments.model, arguments.dtype, arguments.requests)
    print(json.dumps(result, indent=2) if arguments.json else table(result))


def compare(model: str, dtype: str, requests: int) -> dict[str, Any]:
    """Everything measured, and the ratios: against vLLM alone, for each workload and budget."""
    base = {"model": model, "dtype": dtype, "requests": requests}
    measured: dict[str, dict[str, Any]] = {}
    for workload in WORKLOADS:
        measured[workload] = {"vLLM alone": child({**base, "workload": workload, "budget": None})}
        for name, budget in BUDGETS.items():
            measured[workload][name] = child({**base, "workload": workload, "budget": budget})
    latency = {name: child({**base, "budget": budget}) for name, budget in BUDGETS.items()}
    return {
        "model": Path(model).name,
        "dtype": dtype,
        "cores": len(os.sched_getaffinity(0)),
        "requests": requests,
        "interval": INTERVAL,
        "workloads": {name: dict(zip(("prompt", "answer", "blocks"), w, strict=True)) for name, w in WORKLOADS.items()},
        "concurrency_ratio": ratios(measured, "requests_at_once"),
        "throughput_ratio": ratios(measured, "tokens_per_second"),
        "ttft_ratio": {name: times["ratio"] for name, times in latency.items()},
        "measured": measured,
        "single_requests": latency,
    }


def ratios(measured: dict[str, dict[str, Any]], key: str) -> dict[str, dict[str, float]]:
    return {
        budget: {workload: runs[budget][key] / runs["vLLM alone"][key] for workload, runs in measured.items()}
        for budget in BUDGETS
    }


def child(job: dict[str, Any]) -> dict[str, Any]:
    """Runs one engine in a fresh process."""
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR"}
    command = [sys.executable, __file__, "--run", json.dumps(job)]
    print(f"running {job.get('workload', 'single requests')}, budget {job['budget']}", file=sys.stderr, flush=True)
    output = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
    return dict(json.loads(output.strip().splitlines()[-1]))


def run(job: dict[str, Any]) -> dict[str, Any]:
    prompt, answer, blocks = WORKLOADS[job["workload"]] if "workload" in job else (LATENCY_PROMPT, 8, 64)
    from vllm import LLM

    additional = (
        {}
        if job["budget"] is None
        else {"additional_config": {"crushkv": {"budget": job["budget"], "interval": INTERVAL}}}
    )
    llm = LLM(
        model=job["model"],
        dtype=job["dtype"],
        enforce_eager=True,
        block_size=BLOCK,
        max_model_len=-(-(prompt + answer) // BLOCK) * BLOCK,
        max_num_seqs=64,
        max_num_batched_tokens=2048,
        num_gpu_blocks_override=blocks + 1,  # vLLM keeps one to itself
        kv_cache_memory_bytes=2**30,
        enable_prefix_caching=False,
        **additional,
    )
    text = (importlib.resources.files("crushkv.demo") / "document.txt").read_text(encoding="utf-8")
    ids = llm.get_tokenizer()(text, add_special_tokens=False)["input_ids"]
    prompts = [(ids[37 * i :] + ids)[:prompt] for i in range(job["requests"])]
    serve(llm, prompts[:1], 4)  # warm
    if "workload" not in job:
        return take_turns(llm, prompts[:6], answer)
    return serve(llm, prompts, answer)


def serve(llm: Any, prompts: list[list[int]], answer: int, **parameters: Any) -> dict[str, Any]:
    """All requests at once; times in seconds, from when all had been given."""
    from vllm import SamplingParams

    engine = llm.llm_engine
    scheduler = engine.engine_core.engine_core.scheduler
    sampling = SamplingParams(temperature=0, max_tokens=answer, ignore_eos=True, **parameters)
    for i, prompt in enumerate(prompts):
        engine.add_request(f"{time.monotonic_ns()}-{i}", {"prompt_token_ids": prompt}, sampling)
    start = time.perf_counter()
    first: dict[str, float] = {}
    last: dict[str, float] = {}
    running: list[int] = []
    preemptions: dict[str, int] = {}
    steps = 0
    while engine.has_unfinished_requests():
        outputs = engine.step()
        now = time.perf_counter() - start
        steps += 1
        for output in outputs:
            first.setdefault(output.request_id, now)
            last[output.request_id] = now
        if scheduler.waiting:  # there is no more room
            running.append(len(scheduler.running))
        preemptions |= {r.request_id: r.num_preemptions for r in scheduler.running}
    seconds = time.perf_counter() - start
    per_token = [(last[name] - first[name]) / max(1, answer - 1) for name in first]
    return {
        "requests_at_once": statistics.mean(running) if running else float(len(prompts)),
        "most_at_once": max(running, default=len(prompts)),
        "seconds": seconds,
        "tokens_per_second": len(prompts) * answer / seconds,
        "ttft": spread(list(first.values())),
        "tpot": spread(per_token),
        "preemptions": sum(preemptions.values()),
        "steps": steps,
    }


def take_turns(llm: Any, prompts: list[list[int]], answer: int) -> dict[str, Any]:
    """Single requests with KVCrush and without; the ratio is the median of those of neighbours."""
    times: dict[str, list[float]] = {"on": [], "off": []}
    for i, prompt in enumerate(prompts):
        for which in ("on", "off") if i % 2 else ("off", "on"):
            times[which].append(serve(llm, [prompt], answer, extra_args={"crushkv": which})["ttft"]["median"])
    each = [on / off for on, off in zip(times["on"], times["off"], strict=True)]
    return {"ratio": statistics.median(each), "ratios": each, "ttft": {name: spread(t) for name, t in times.items()}}


def spread(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    return {"median": statistics.median(ordered), "p95": ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))]}


def table(result: dict[str, Any]) -> str:
    lines = [f"{result['model']}, {result['dtype']}, {result['cores']} cores, {result['requests']} requests each", ""]
    for workload, runs in result["measured"].items():
        size = result["workloads"][workload]
        lines += [
            f"{workload}: {size['prompt']} tokens, answers of {size['answer']}, a pool of {size['blocks']} blocks",
            "",
            "| | requests at once | tokens/s | TTFT median (95 %) | TPOT median (95 %) | preemptions | steps |",
            "|---|---|---|---|---|---|---|",
        ]
        for name, run_ in runs.items():
            cells = (
                name,
                f"{run_['requests_at_once']:.1f}",
                f"{run_['tokens_per_second']:.1f}",
                f"{run_['ttft']['median']:.1f} s ({run_['ttft']['p95']:.1f})",
                f"{run_['tpot']['median'] * 1e3:.0f} ms ({run_['tpot']['p95'] * 1e3:.0f})",
                str(run_["preemptions"]),
                str(run_["steps"]),
            )
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    shown = ", ".join(f"{name} {ratio:.2f}x" for name, ratio in result["ttft_ratio"].items())
    lines.append(f"time to first token of a single request of {LATENCY_PROMPT} tokens, against vLLM alone: {shown}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
