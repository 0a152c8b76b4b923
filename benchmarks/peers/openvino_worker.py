"""OpenVINO GenAI's worker: its full cache, its eviction by SnapKV's scores, and its own KVCrush, from a GGUF file."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import openvino_genai as genai
from openvino import Tensor

from worker import Method, Outcome, Request, Run, arguments, serve, versions

BLOCK = 32  # tokens; every size of its eviction is a multiple
START, RECENT = 32, 32  # tokens never evicted
SHARE = 0.1  # of KVCrush's representatives, as in crushkv's worker
WARM_UP = 64  # tokens

EVICTION = (
    "The prompt is read and the second token made with the full cache, which stays reserved: the peak does not fall."
)
METHODS = {
    "full": Method(None),
    "snapkv": Method(note=EVICTION),
    "kvcrush": Method(note=EVICTION),
    "full-8bit": Method(None),
    "kvcrush-8bit": Method(note=EVICTION),
}


def main() -> None:
    given = arguments()

    def prepare(request: Request) -> Run:
        # Eviction is configured in tokens, and a pipeline keeps the memory of its longest request: one pipeline each.
        scheduler, crush_off = schedule(request)
        properties = {"INFERENCE_NUM_THREADS": given.threads, "INFERENCE_PRECISION_HINT": "f32"}
        if not request.method.endswith("-8bit"):  # its default
            properties["KV_CACHE_PRECISION"] = "f32"
        pipeline = genai.ContinuousBatchingPipeline(
            given.model, scheduler_config=scheduler, device="CPU", properties=properties
        )
        answer(pipeline, [request.prompts[0][:WARM_UP]], 2)
        block_bytes = pipeline.get_metrics().cache_size_in_bytes // blocks(WARM_UP + 1)

        def run() -> Outcome:
            times, held = answer(pipeline, request.prompts, request.new_tokens)
            full = request.batch * blocks(request.tokens + request.new_tokens - 1) * block_bytes
            a_row = round(held / block_bytes / request.batch)
            note = f"KVCrush was not active: {a_row} blocks are held." if a_row <= crush_off else None
            return Outcome(times, held, full, note)

        return run

    serve("openvino", METHODS, versions("openvino-genai", "openvino"), given.prompt, prepare)


def blocks(tokens: int) -> int:
    return -(-tokens // BLOCK)


def schedule(request: Request) -> tuple[Any, int]:
    """The scheduler's configuration, its defaults where nothing is said; and the most blocks held without KVCrush."""
    scheduler = genai.SchedulerConfig()
    scheduler.enable_prefix_caching = False  # breaks the account of the blocks where there is eviction
    if request.budget is None:
        return scheduler, 0
    kept = int(request.tokens * request.budget) // BLOCK
    crush = None
    if request.method.startswith("kvcrush"):
        # Its budget comes on top of max_cache_size.
        representatives = max(1, round(SHARE * (kept - (START + RECENT) // BLOCK)))
        kept -= representatives
        crush = genai.KVCrushConfig(representatives, genai.KVCrushAnchorPointMode.MEAN)
    mode = genai.AggregationMode.NORM_SUM
    scheduler.use_cache_eviction = True
    scheduler.cache_eviction_config = genai.CacheEvictionConfig(START, RECENT, kept * BLOCK, mode, kvcrush_config=crush)
    return scheduler, kept + 1 if crush else 0  # and the block that is being filled


def answer(pipeline: Any, prompts: Any, new_tokens: int) -> tuple[list[float], int]:
    """Seconds until all prompts had a first token, and to each step after it; bytes of the blocks in use at the end."""
    config = genai.GenerationConfig(max_new_tokens=new_tokens, ignore_eos=True, do_sample=False)
    start = time.perf_counter()
    handles = [pipeline.add_request(i, Tensor(np.array([ids])), config) for i, ids in enumerate(prompts)]
    times = []
    waiting = set(range(len(handles)))
    held = 0.0
    while pipeline.has_non_finished_requests():
        pipeline.step()
        waiting -= {i for i in waiting if handles[i].can_read()}
        if not waiting:
            times.append(time.perf_counter() - start)
        metrics = pipeline.get_metrics()
        held = metrics.cache_size_in_bytes * metrics.cache_usage / 100
    return times, round(held)


if __name__ == "__main__":
    main()
