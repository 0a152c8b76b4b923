"""The blocks of each request: allocated for what is held, not for what was seen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vllm.utils.math_utils import cdiv
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager

from .schedule import Eviction, EvictionSchedule


@dataclass(frozen=True)
class Compaction:
    """Tells a worker to move kept tokens into `blocks` before this step. The request then holds only these."""

    eviction: Eviction
    blocks: list[int]


@dataclass
class _Reservation:
    eviction: Eviction
    target: list[KVCacheBlock]
    fresh: list[KVCacheBlock]  # the part of the target that was taken from the pool

    @property
    def in_place(self) -> bool:
        return len(self.fresh) < len(self.target)


class CompactingManager(FullAttentionManager):
    """vLLM's manager of full-attention blocks, for requests that hold less than they have seen.

    A request is compacted between the step that computes its tokens up to a point of its schedule and the next one, so
    that the token of the first step does not wait for it. The blocks for what is kept are reserved together with those
    of the first step, so that vLLM's own ways of making room (a request waits, others are preempted) apply to them.
    `commit` then ends the scheduler's step: what does not fit into the reserved blocks is free for the next one. Its
    workers move what is kept (`take_due`) before they write anything.

    Where prefix caching is on, what is kept is copied out into fresh blocks, and the old ones stay in the prefix
    cache. Where too few blocks are free, the request's own blocks take the rest, those that nobody shares, and leave
    the prefix cache. Without prefix caching, and from the second compaction on, everything stays in place.
    """

    schedules: dict[str, EvictionSchedule]
    dropped: dict[str, int]  # tokens seen and no longer held
    reservations: dict[str, _Reservation]
    due: dict[str, Compaction]  # committed, and not yet taken

    @classmethod
    def adopt(cls, manager: FullAttentionManager) -> CompactingManager:
        """Turns vLLM's manager into this one, in place: vLLM keeps several references to it."""
        manager.__class__ = cls
        manager.schedules, manager.dropped, manager.reservations, manager.due = {}, {}, {}, {}
        return manager

    def held(self, request_id: str, seen: int) -> int:
        """Tokens in the cache, before a compaction at `seen`."""
        return seen - self.dropped.get(request_id, 0)

    def _eviction(self, request_id: str, seen: int) -> Eviction | None:
        schedule = self.schedules.get(request_id)
        if schedule is None or not schedule.clock.is_point(seen - 1):
            return None
        return schedule.eviction(seen, self.held(request_id, seen))

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Any,
        total_computed_tokens: int,
        num_local_computed_tokens: int,
        num_tokens_main_model: int,
        apply_admission_cap: bool = False,
        prefill_end: int = 0,
    ) -> int:
        held = self.held(request_id, num_tokens)
        schedule = self.schedules.get(request_id)
        if apply_admission_cap and schedule is not None and request_id not in self.dropped:
            # Of a whole request that was preempted, which drops tokens again on its way.
            held = schedule.most_held(num_tokens)
        needed: int = super().get_num_blocks_to_allocate(
            request_id,
            held,
            new_computed_blocks,
            total_computed_tokens,
            num_local_computed_tokens,
            held,
            apply_admission_cap=apply_admission_cap,
            prefill_end=prefill_end,
        )
        if self.enable_caching and (eviction := self._eviction(request_id, num_tokens)) is not None:
            own = self.req_to_blocks.get(request_id, ())
            shared = sum(b.ref_cnt > 1 for b in own) + sum(b.ref_cnt > 0 for b in new_computed_blocks)
            target = cdiv(eviction.kept, self.block_size)
            needed += max(0, target - (cdiv(held, self.block_size) - shared))
        return needed

    def allocate_new_blocks(self, request_id: str, num_tokens: int, num_tokens_main_model: int) -> list[KVCacheBlock]:
        held = self.held(request_id, num_tokens)
        new: list[KVCacheBlock] = super().allocate_new_blocks(request_id, held, held)
        if (eviction := self._eviction(request_id, num_tokens)) is not None:
            self.reservations[request_id] = self._reserve(request_id, eviction)
        return new

    def _reserve(self, request_id: str, eviction: Eviction) -> _Reservation:
        own = self.req_to_blocks[request_id]
        count = cdiv(eviction.kept, self.block_size)
        if not self.enable_caching or request_id in self.dropped:  # nobody else can have these blocks
            return _Reservation(eviction, own[:count], [])
        fresh = self.block_pool.get_new_blocks(min(count, self.block_pool.get_num_free_blocks()))
        mine = [block for block in reversed(own) if block.ref_cnt == 1][: count - len(fresh)]
        assert len(fresh) + len(mine) == count, "blocks were not reserved with the step's"
        # They are overwritten after this step, so from now on nobody else may find them.
        self.block_pool.evict_blocks({block.block_id for block in mine})
        return _Reservation(eviction, fresh + mine, fresh)

    def cache_blocks(self, request: Any, num_tokens: int, *args: Any, **kwargs: Any) -> None:
        # What follows a compaction was computed from a compressed past: only this request may use it.
        reservation = self.reservations.get(request.request_id)
        if request.request_id in self.dropped or (reservation is not None and reservation.in_place):
            return
        super().cache_blocks(request, num_tokens, *args, **kwargs)

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        self.dropped.pop(request_id, None)
        self.due.pop(request_id, None)  # nobody will read it
        reservation = self.reservations.pop(request_id, None)
        blocks: list[KVCacheBlock] = super().pop_blocks_for_free(request_id)
        return blocks if reservation is None else blocks + reservation.fresh

    def take_due(self) -> dict[str, Compaction]:
        """The compactions of the previous step, without requests that have ended or start again."""
        due, self.due = self.due, {}
        return due

    def commit(self) -> tuple[list[Eviction], int]:
        """Ends a step of the scheduler: its evictions, and how many blocks they free.

        The blocks are free at once: whoever gets them next writes to them in a later step, behind the compaction.
        """
        evictions, freed = [], 0
        for request_id, reservation in self.reservations.items():
            old, target = self.req_to_blocks[request_id], reservation.target
            ids = [block.block_id for block in target]
            self.req_to_blocks[request_id] = list(target)
            kept = set(ids)
            self.block_pool.free_blocks([block for block in reversed(old) if block.block_id not in kept])
            eviction = reservation.eviction
            self.dropped[request_id] = eviction.seen - eviction.kept
            freed += len(old) - len(target)
            evictions.append(eviction)
            self.due[request_id] = Compaction(eviction, ids)
        self.reservations.clear()
        return evictions, freed
