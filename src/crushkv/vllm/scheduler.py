"""The scheduler decides when requests are compacted, and frees their blocks; workers obey."""

from __future__ import annotations

import time
from typing import Any

from vllm.platforms import current_platform
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.request import RequestStatus

from .._version import __version__
from ..core import Evictor, Shares
from .blocks import CompactingManager
from .log import logger
from .metrics import Counters, Sender
from .schedule import EvictionSchedule
from .settings import engine_config, request_schedule
from .support import bytes_per_token, check_groups, check_signature


def check_signatures() -> None:
    """Refuses a vLLM whose scheduler is not the one that the classes below were written for."""
    check_signature(Scheduler.add_request, "request")
    check_signature(Scheduler.schedule, "throttle_prefills")
    check_signature(Scheduler._get_local_prefix_cache_hit, "request")
    check_signature(Scheduler._reserve_prefill_lookahead, "request", "num_computed_tokens", "num_new_tokens")
    check_signature(Scheduler._free_blocks, "request")
    check_signature(Scheduler._preempt_request, "request", "timestamp", "drop_stale_output")
    check_signature(Scheduler.update_from_output, "scheduler_output", "model_runner_output")
    check_signature(
        FullAttentionManager.get_num_blocks_to_allocate,
        "request_id",
        "num_tokens",
        "new_computed_blocks",
        "total_computed_tokens",
        "num_local_computed_tokens",
        "num_tokens_main_model",
        "apply_admission_cap",
        "prefill_end",
    )
    check_signature(FullAttentionManager.allocate_new_blocks, "request_id", "num_tokens", "num_tokens_main_model")


class CrushScheduler(Scheduler):
    """vLLM's scheduler, with eviction at the points of each request's schedule."""

    evictor: Evictor
    blocks: CompactingManager

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        check_signatures()
        check_groups(self.kv_cache_config.kv_cache_groups)
        config = engine_config(self.vllm_config.additional_config)
        assert config is not None, "the plugin has put it there"
        self.config = config
        self.evictor = Evictor(config)
        self.counters = Counters()
        self.sender = Sender(self.counters)
        self.bytes_per_token = bytes_per_token(self.vllm_config)
        self.blocks = CompactingManager.adopt(self.kv_cache_manager.coordinator.single_type_managers[0])
        if current_platform.is_cpu():
            # A CPU multiplies what lies behind a request's last token by zero: a NaN that another request left there
            # would end up in its answer. vLLM clears new blocks for other kinds of models, and has all it takes.
            self.needs_kv_cache_zeroing = self.blocks._record_new_block_ids = True
        self._say_what_is_on()

    def _say_what_is_on(self) -> None:
        config, longest = self.config, self.max_model_len
        logger.info(
            "crushkv %s is on: budget=%s, min_tokens=%d, policy=%s, interval=%d, block_size=%d",
            __version__,
            config.budget,
            config.untouched_below,
            config.policy,
            config.interval,
            self.blocks.block_size,
        )
        whole = EvictionSchedule(config, longest, (Shares(config, 1),), self.bytes_per_token, self.blocks.block_size)
        if whole.eviction(longest, longest) is None:
            logger.warning(
                "crushkv: nothing will be compressed: of a request of max_model_len=%d tokens, budget=%s frees no "
                "block of %d tokens (min_tokens=%d, sink + window = %d)",
                longest,
                config.budget,
                self.blocks.block_size,
                config.untouched_below,
                config.sink + config.window,
            )

    def add_request(self, request: Any) -> None:
        if request.resumable:
            # Its prompt grows between its turns: where it ends is not known.
            logger.warning_once("crushkv: sessions with streaming input are left uncompressed")
        elif request.request_id not in self.requests:
            schedule = request_schedule(
                self.config,
                request.num_prompt_tokens,
                request.sampling_params.extra_args,
                self.bytes_per_token,
                self.blocks.block_size,
            )
            if schedule is not None:
                self.blocks.schedules[request.request_id] = schedule
                self._warn_if_tight(schedule)
        super().add_request(request)

    def _warn_if_tight(self, schedule: EvictionSchedule) -> None:
        always, page = self.config.sink + self.config.window, self.config.page_size
        eviction = schedule.eviction(schedule.prompt, schedule.prompt)
        if eviction is not None and eviction.budget < always + page:
            logger.warning_once(
                "crushkv: budget=%r leaves short prompts no room for a page of %d besides sink + window = %d: "
                "only their first and last tokens are kept",
                self.config.budget,
                page,
                always,
            )

    def _free_blocks(self, request: Any) -> None:
        self.blocks.schedules.pop(request.request_id, None)
        super()._free_blocks(request)

    def _reserve_prefill_lookahead(self, request: Any, num_computed_tokens: int, num_new_tokens: int) -> int:
        """Limits the tokens of a step, so that no step crosses a point of the schedule."""
        tokens: int = super()._reserve_prefill_lookahead(request, num_computed_tokens, num_new_tokens)
        schedule = self.blocks.schedules.get(request.request_id)
        point = None if schedule is None else schedule.clock.next_point(num_computed_tokens)
        return tokens if point is None else min(tokens, point - num_computed_tokens)

    def _get_local_prefix_cache_hit(self, request: Any) -> tuple[Any, int, int, bool]:
        """Shortens a prefix hit, so that the queries that score are computed."""
        hit, tokens, boundary, diverged = super()._get_local_prefix_cache_hit(request)
        schedule = self.blocks.schedules.get(request.request_id)
        if schedule is None:
            return hit, tokens, boundary, diverged
        scored = schedule.prompt if self.evictor.streams else self.evictor.tail
        size = self.blocks.block_size
        usable = max(0, schedule.prompt - scored) // size * size
        if tokens > usable:
            hit, tokens = self.kv_cache_manager.truncate_computed_blocks(hit, usable), usable
        return hit, tokens, boundary, diverged

    def schedule(self, throttle_prefills: bool = False) -> Any:
        output = super().schedule(throttle_prefills)
        output.crushkv = self.blocks.take_due()
        evictions, freed = self.blocks.commit()
        self.counters.compactions += len(evictions)
        self.counters.tokens_dropped += sum(eviction.held - eviction.kept for eviction in evictions)
        self.counters.blocks_freed += freed
        return output

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        report = getattr(model_runner_output, "crushkv", None)
        if report is not None:
            self.counters.microseconds += report.microseconds
            for request_id in report.failed:
                self._leave_alone(request_id)
        return super().update_from_output(scheduler_output, model_runner_output)

    def _leave_alone(self, request_id: str) -> None:
        """Computes a request again and leaves it in full, because it could not be compacted and its blocks are gone."""
        if self.blocks.schedules.pop(request_id, None) is None:
            return  # heard of before
        request = self.requests.get(request_id)
        if request is not None and request.status == RequestStatus.RUNNING:
            self.running.remove(request)
            # What is computed of it in this step, or already scheduled for the next, is of no use.
            self._preempt_request(request, time.monotonic(), drop_stale_output=True)
            self.prev_step_scheduled_req_ids.discard(request_id)

    def make_stats(self, *args: Any, **kwargs: Any) -> Any:
        stats = super().make_stats(*args, **kwargs)
        if stats is not None:
            self.sender.add_to(stats)
        return stats


class CrushAsyncScheduler(CrushScheduler, AsyncScheduler):
    """The same for asynchronous scheduling."""
