"""What KVCrush did, beside vLLM's own metrics: counted by the scheduler, shown by the server's `/metrics`."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from .settings import engine_config

DESCRIPTIONS = {
    "compactions": "Evictions from the cache of one request, in all layers.",
    "tokens_dropped": "Tokens evicted, counted once for all layers.",
    "blocks_freed": "Blocks that evictions gave back.",
    "microseconds": "Time that workers spent scoring, selecting and moving.",
}


@dataclass
class Counters:
    """Since the start of the engine."""

    compactions: int = 0
    tokens_dropped: int = 0
    blocks_freed: int = 0
    microseconds: int = 0

    def add_to(self, stats: Any) -> None:
        """Sends the counters along with vLLM's `SchedulerStats`.

        These reach the server as a fixed set of fields, without one for plugins. The counts by LoRA adapter are a
        mapping that is read only with LoRA, which is refused.
        """
        stats.waiting_lora_adapters = asdict(self)


def install() -> None:
    """Makes vLLM's Prometheus logger show the counters of engines in which KVCrush is on."""
    from prometheus_client import Counter
    from vllm.v1.metrics.loggers import PrometheusStatLogger

    create, record = PrometheusStatLogger.__init__, PrometheusStatLogger.record

    @functools.wraps(create)
    def init(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        create(self, vllm_config, *args, **kwargs)
        self.crushkv = None
        if engine_config(vllm_config.additional_config) is not None:
            self.crushkv = {
                name: Counter(f"crushkv:{name}", description, ["engine"]) for name, description in DESCRIPTIONS.items()
            }
            self.crushkv_seen = {}

    @functools.wraps(record)
    def record_too(self: Any, scheduler_stats: Any, *args: Any, engine_idx: int = 0, **kwargs: Any) -> None:
        record(self, scheduler_stats, *args, engine_idx=engine_idx, **kwargs)
        if self.crushkv is not None and scheduler_stats is not None:
            self.crushkv_seen[engine_idx] = _count(
                self.crushkv, scheduler_stats.waiting_lora_adapters, self.crushkv_seen.get(engine_idx, {}), engine_idx
            )

    PrometheusStatLogger.__init__, PrometheusStatLogger.record = init, record_too


def _count(
    counters: Mapping[str, Any], totals: Mapping[str, int], seen: Mapping[str, int], engine: int
) -> Mapping[str, int]:
    for name, total in totals.items():
        counters[name].labels(engine=str(engine)).inc(total - seen.get(name, 0))
    return dict(totals) or seen
