"""vLLM's blocks under the plugin, in any order of events: the real scheduler, with a worker of plain Python lists."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.utils.math_utils import cdiv
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from crushkv.vllm.runner import Report
from crushkv.vllm.scheduler import CrushScheduler

BLOCK, POOL, LONGEST = 8, 26, 176
SINK, WINDOW, PAGE, INTERVAL, LEAST = 1, 3, 2, 5, 12
CRUSH = {
    "budget": 0.3,
    "min_tokens": LEAST,
    "sink": SINK,
    "window": WINDOW,
    "page_size": PAGE,
    "interval": INTERVAL,
}
SHARED = [[random.Random(family).randint(3, 500) for _ in range(LONGEST)] for family in range(3)]
HASH = get_hash_fn_by_name("sha256")
Cell = tuple[Any, ...]


def kept_of(asked: Any, seen: int, held: int) -> int:
    """How many of `held` tokens a request keeps at a point, in plain arithmetic."""
    if asked == "off":
        return held
    limits = [seen * 3 // 10 if seen >= LEAST else seen]
    if isinstance(asked, int):
        limits.append(asked)
    elif isinstance(asked, float):
        limits.append(seen * round(asked * 100) // 100 if seen >= LEAST else seen)
    budget = max(min(limits), min(seen, SINK + WINDOW))
    if held <= budget:
        return held
    middle, contested = held - SINK - WINDOW, budget - SINK - WINDOW
    rest = min(middle % PAGE, contested)
    kept = SINK + WINDOW + rest + min((contested - rest) // PAGE, middle // PAGE) * PAGE
    return held if cdiv(kept, BLOCK) == cdiv(held, BLOCK) else kept


class Worker:
    """Blocks as lists of cells. A cell names the text that its token was computed from."""

    def __init__(self) -> None:
        self.cells: list[list[Cell | None]] = [[None] * BLOCK for _ in range(POOL)]
        self.tables: dict[str, list[int]] = {}
        self.texts: dict[str, list[Cell]] = {}  # what a request has to find in its blocks

    def read(self, name: str, count: int) -> list[Cell | None]:
        table = self.tables[name]
        return [self.cells[table[place // BLOCK]][place % BLOCK] for place in range(count)]

    def write(self, name: str, cell: Cell) -> None:
        place = len(self.texts[name])
        self.cells[self.tables[name][place // BLOCK]][place % BLOCK] = cell
        self.texts[name].append(cell)

    def check(self, name: str) -> None:
        """Nobody has written over what the request holds."""
        assert self.read(name, len(self.texts[name])) == self.texts[name]

    def compact(self, name: str, kept: int, blocks: list[int]) -> None:
        self.check(name)
        text = self.texts[name]
        self.tables[name], self.texts[name] = list(blocks), []
        for cell in [*text[:SINK], *text[len(text) - kept + SINK :]]:
            self.write(name, cell)


class Blocks(RuleBasedStateMachine):
    vllm_config: Any
    caching: bool

    @initialize(seed=st.integers(0, 2**20))
    def begin(self, seed: int) -> None:
        spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=8, dtype=torch.float32)
        cache = KVCacheConfig(POOL, [], [KVCacheGroupSpec(["layers.0"], spec)])
        self.scheduler = CrushScheduler(
            self.vllm_config, cache, StructuredOutputManager(self.vllm_config), BLOCK, BLOCK, log_stats=True
        )
        self.manager, self.pool = self.scheduler.blocks, self.scheduler.kv_cache_manager.block_pool
        self.free = self.pool.get_num_free_blocks()
        self.worker = Worker()
        self.draw = random.Random(seed)
        self.requests: dict[str, Request] = {}
        self.asked: dict[str, Any] = {}
        self.held: dict[str, int] = {}  # by this test's own arithmetic
        self.failing: set[str] = set()
        self.seen: Counter[str] = Counter()
        self.compactions = 0

    # Events

    @rule(
        family=st.integers(0, 2),
        shared=st.integers(0, 120),
        own=st.integers(1, 40),
        new=st.integers(1, 50),
        asked=st.sampled_from(["on", "on", "on", "off", 0.1, 20]),
        fails=st.integers(0, 3),
    )
    def arrive(self, family: int, shared: int, own: int, new: int, asked: Any, fails: int) -> None:
        self.seen["arrive"] += 1
        name = f"r{self.seen['arrive']}"
        prompt = (SHARED[family][:shared] + [self.draw.randint(3, 500) for _ in range(own)])[: LONGEST - new - 1]
        sampling = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, extra_args={"crushkv": asked})
        sampling._eos_token_id = None
        request = Request(name, prompt, sampling, None, block_hasher=get_request_block_hasher(BLOCK, HASH))
        self.requests[name], self.asked[name] = request, asked
        if fails == 0:
            self.failing.add(name)
        self.scheduler.add_request(request)

    @rule(finished=st.integers(0, 5))
    def next_turn(self, finished: int) -> None:
        """A prompt that goes on from the text of another request."""
        if self.requests:
            request = list(self.requests.values())[finished % len(self.requests)]
            text = list(request.all_token_ids)[: LONGEST - 20]
            self.seen["arrive"] += 1
            name = f"r{self.seen['arrive']}"
            sampling = SamplingParams(temperature=0, max_tokens=9, ignore_eos=True)
            new = Request(name, [*text, 7, 8], sampling, None, block_hasher=get_request_block_hasher(BLOCK, HASH))
            self.requests[name], self.asked[name] = new, "on"
            self.scheduler.add_request(new)

    @rule(which=st.integers(0, 5))
    def abort(self, which: int) -> None:
        if self.requests:
            name = list(self.requests)[which % len(self.requests)]
            self.scheduler.finish_requests(name, RequestStatus.FINISHED_ABORTED)
            self._ended(name)

    @rule()
    def preempt(self) -> None:
        assert self.scheduler.reset_prefix_cache(reset_running_requests=True)
        self.seen["preempt"] += 1

    @rule(count=st.integers(1, 12))
    def steps(self, count: int) -> None:
        for _ in range(count):
            if not self.requests:
                return
            self.step()
            self.check()

    def _ended(self, name: str) -> None:
        del self.requests[name]
        for known in (self.held, self.asked, self.worker.tables, self.worker.texts):
            known.pop(name, None)
        self.failing.discard(name)

    # One step of the engine

    def step(self) -> None:
        output = self.scheduler.schedule()
        failed = set()
        for name, compaction in output.crushkv.items():
            self.compactions += 1
            assert len(self.worker.texts[name]) == compaction.eviction.held
            self.worker.compact(name, compaction.eviction.kept, compaction.blocks)
            if name in self.failing:
                failed.add(name)
        for new in output.scheduled_new_reqs:
            self._start(new.req_id, new.block_ids[0], new.num_computed_tokens)
        cached = output.scheduled_cached_reqs
        for name, blocks, computed in zip(
            cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, strict=True
        ):
            if name in cached.resumed_req_ids:
                self._start(name, blocks[0], computed)
            elif blocks is not None:
                self.worker.tables[name] += blocks[0]
        sampled = [self._compute(name, tokens) for name, tokens in output.num_scheduled_tokens.items()]
        names = list(output.num_scheduled_tokens)
        for name in names:  # after all have written: a prefix may be shared with the step that computes it
            self.worker.check(name)
        result = ModelRunnerOutput(names, {name: i for i, name in enumerate(names)}, sampled)
        result.crushkv = Report(0, frozenset(failed))
        for name in failed:
            self.asked[name] = "off"
            self.failing.discard(name)
            self.seen["failed"] += 1
        if names:
            self.scheduler.update_from_output(output, result)
        for name in [name for name, request in self.requests.items() if request.is_finished()]:
            self.seen["finished"] += 1
            self._ended(name)

    def _start(self, name: str, blocks: list[int], computed: int) -> None:
        """A request begins, or begins anew, with so many tokens out of the prefix cache."""
        self.worker.tables[name] = list(blocks)
        self.worker.texts[name] = self._cells(name, 0, computed)
        self.held[name] = computed
        self.seen["hit"] += computed > 0

    def _cells(self, name: str, start: int, end: int) -> list[Cell]:
        tokens = tuple(self.requests[name].all_token_ids[:end])
        return [(place, hash(tokens[: place + 1])) for place in range(start, end)]

    def _compute(self, name: str, tokens: int) -> list[int]:
        request = self.requests[name]
        before = request.num_computed_tokens - tokens
        private = () if len(self.worker.texts[name]) == before else (name, request.num_preemptions)
        for cell in self._cells(name, before, before + tokens):
            self.worker.write(name, cell + private)
        seen = before + tokens
        self.held[name] += tokens
        prompt = request.num_prompt_tokens
        if self.asked[name] != "off":
            assert seen <= prompt or (before - prompt) // INTERVAL == (seen - 1 - prompt) // INTERVAL, "crosses a point"
            assert not before < prompt < seen
        if seen == prompt or (seen > prompt and (seen - prompt) % INTERVAL == 0):
            self.held[name] = kept_of(self.asked[name], seen, self.held[name])
        return [hash(tuple(request.all_token_ids)) % 4 + 3] if seen == request.num_tokens else []

    # What has to hold

    def check(self) -> None:
        holders: Counter[int] = Counter()
        for request in self.scheduler.running:
            name = request.request_id
            blocks = [block.block_id for block in self.manager.req_to_blocks[name]]
            assert len(set(blocks)) == len(blocks)
            assert self.manager.held(name, request.num_computed_tokens) == self.held[name]
            assert len(blocks) == cdiv(self.held[name], BLOCK)
            holders.update(blocks)
        for block in self.pool.blocks:
            if not block.is_null:
                assert block.ref_cnt == holders[block.block_id], "lost, or shared by more than hold it"
        assert self.pool.get_num_free_blocks() == self.free - len(holders)
        for block_hash, entry in self.pool.cached_block_hash_to_block._cache.items():
            for block in entry.values() if isinstance(entry, dict) else [entry]:
                cells = self.worker.cells[block.block_id]
                assert all(cell is not None and len(cell) == 2 for cell in cells), "computed from a compacted past"
                assert [cell[0] % BLOCK for cell in cells if cell] == list(range(BLOCK)), block_hash

    @invariant()
    def nothing_is_lost(self) -> None:
        if hasattr(self, "scheduler"):
            self.check()

    def teardown(self) -> None:
        for _ in range(3000):
            if not self.requests:
                break
            self.step()
            self.check()
        assert not self.requests, "requests do not end"
        assert self.pool.get_num_free_blocks() == self.free
        assert not (self.manager.schedules or self.manager.dropped or self.manager.reservations or self.manager.due)
        totals.update(self.seen, compactions=self.compactions)


totals: Counter[str] = Counter()


@pytest.fixture(scope="module")
def vllm_config(small: Path) -> Any:
    args = EngineArgs(
        str(small),
        skip_tokenizer_init=True,
        enforce_eager=True,
        max_model_len=LONGEST,
        max_num_batched_tokens=48,
        max_num_seqs=6,
        additional_config={"crushkv": CRUSH},
    )
    config = args.create_engine_config()
    config.cache_config.block_size = BLOCK
    config.cache_config.num_gpu_blocks = POOL
    init_none_hash(HASH)
    return config


EVENTS = ("compactions", "finished", "failed", "preempt")


@pytest.mark.parametrize("caching", [False, True], ids=["no prefix caching", "prefix caching"])
def test_any_order(vllm_config: Any, caching: bool) -> None:
    vllm_config.cache_config.enable_prefix_caching = caching
    totals.clear()
    machine = type("Machine", (Blocks,), {"vllm_config": vllm_config})
    for _ in range(5):  # now and then, hypothesis draws few events of a kind
        run_state_machine_as_test(
            machine,
            settings=settings(
                max_examples=80,
                stateful_step_count=30,
                deadline=None,
                suppress_health_check=list(HealthCheck),
                phases=(Phase.explicit, Phase.generate),  # minutes of shrinking
            ),
        )
        if min(totals[event] for event in EVENTS) >= 10 and (totals["hit"] > 10) == caching:
            break
    # The events that matter took place.
    assert min(totals[event] for event in EVENTS) >= 10, totals
    assert (totals["hit"] > 10) == caching
