"""What KVCrush did, beside vLLM's own metrics: counted by the scheduler, shown by the server's `/metrics`."""

from __future__ import annotations

import functools
from dataclasses import asdict, dataclass, field
from typing import Any

from .settings import engine_config

PREFIX = "crushkv:"
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


@dataclass
class Sender:
    """Sends the increments of the counters along with vLLM's `SchedulerStats`.

    Each of these reaches one API server, and vLLM adds up the counters of all servers. So it has to bring increments,
    not totals. They have a fixed set of fields, without one for plugins. The counts by LoRA
    adapter are a mapping that is read only with LoRA, which is refused.
    """

    counters: Counters
    sent: dict[str, int] = field(default_factory=dict)

    def add_to(self, stats: Any) -> None:
        totals = asdict(self.counters)
        stats.waiting_lora_adapters = {name: total - self.sent.get(name, 0) for name, total in totals.items()}
        self.sent = totals


def install() -> None:
    """Makes vLLM's Prometheus logger show the counters of engines in which KVCrush is on."""
    from vllm.v1.metrics.loggers import PrometheusStatLogger

    create, record = PrometheusStatLogger.__init__, PrometheusStatLogger.record

    @functools.wraps(create)
    def init(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        create(self, vllm_config, *args, **kwargs)
        _unregister()
        self.crushkv = {}
        if engine_config(vllm_config.additional_config) is not None:
            for name, description in DESCRIPTIONS.items():
                counter = self._counter_cls(
                    name=PREFIX + name, documentation=description, labelnames=["model_name", "engine"]
                )
                for engine, labels in self.per_engine_labelvalues.items():  # from now on they are shown, as zero
                    self.crushkv[engine, name] = counter.labels(*labels)

    @functools.wraps(record)
    def record_too(self: Any, scheduler_stats: Any, *args: Any, engine_idx: int = 0, **kwargs: Any) -> None:
        record(self, scheduler_stats, *args, engine_idx=engine_idx, **kwargs)
        if self.crushkv and scheduler_stats is not None:
            for name, more in scheduler_stats.waiting_lora_adapters.items():
                self.crushkv[engine_idx, name].inc(more)

    PrometheusStatLogger.__init__, PrometheusStatLogger.record = init, record_too


def _unregister() -> None:
    """Removes the metrics of an earlier engine in this process, as vLLM does with its own."""
    from prometheus_client import REGISTRY

    for collector in list(REGISTRY._collector_to_names):
        if getattr(collector, "_name", "").startswith(PREFIX):
            REGISTRY.unregister(collector)
