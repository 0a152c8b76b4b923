"""The model runner: positions count the text, lengths and slots count the tokens held."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.distributed.parallel_state import get_tp_group
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, AsyncModelRunnerOutput, ModelRunnerOutput
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from ..config import CrushConfig
from ..core import Clock
from .compactor import Compaction, Compactor, PagedLayer, StepRow
from .log import logger
from .settings import request_clock
from .support import check_layers, check_signature

MOST_REASONS = 10  # in the log


def check_signatures() -> None:
    """Refuses a vLLM whose model runner is not the one that the class below was written for."""
    check_signature(GPUModelRunner._update_states, "scheduler_output")
    check_signature(GPUModelRunner._prepare_inputs, "scheduler_output", "num_scheduled_tokens")
    check_signature(GPUModelRunner.execute_model, "scheduler_output", "intermediate_tensors")
    check_signature(GPUModelRunner.sample_tokens, "grammar_output")


@dataclass(frozen=True)
class Report:
    """A worker's report, sent with the tokens of a step.

    Attributes:
        microseconds: spent on compactions since the last report.
        failed: requests that could not be compacted before the step. Their tokens of this step are wrong.
    """

    microseconds: int
    failed: frozenset[str]


def _with(output: ModelRunnerOutput, report: Report) -> ModelRunnerOutput:
    output.crushkv = report
    return output


def _of_all_workers(flags: list[bool], names: list[str]) -> list[str]:
    """The names whose flag is set in any worker of a tensor-parallel group."""
    group = get_tp_group()
    if group.world_size > 1:
        shared = torch.tensor(flags, dtype=torch.int32)
        torch.distributed.all_reduce(shared, torch.distributed.ReduceOp.MAX, group=group.cpu_group)
        flags = shared.bool().tolist()
    return [name for name, flag in zip(names, flags, strict=True) if flag]


class CompactingRunner(GPUModelRunner):
    """vLLM's V1 model runner, which the runners of all platforms derive from.

    `crush` is made when the cache is (`start`). Until then, and in dummy runs, nothing here does anything.
    """

    crush: Compactor | None = None

    def start(self, config: CrushConfig, layers: dict[str, PagedLayer]) -> None:
        """Takes vLLM's attention layers and begins to watch them."""
        self.crush = Compactor(config, list(layers.values()))
        self.crush_reported = 0.0  # of the seconds spent, how many the scheduler has heard of
        self.crush_dropped: dict[str, int] = {}
        self.crush_clocks: dict[str, Clock | None] = {}
        self.crush_failed: set[str] = set()  # requests that the scheduler will start anew
        self.crush_reasons: set[str] = set()  # why, as far as the log has been told
        modules = self.compilation_config.static_forward_context
        for index, name in enumerate(layers):
            watch(modules[name].impl, self.crush, index)

    def _update_states(self, scheduler_output: Any) -> Any:
        if self.crush is not None:
            for request_id in scheduler_output.scheduled_cached_reqs.resumed_req_ids:
                self.crush.restart(request_id)
                self._start_anew(request_id)
            for request_id in scheduler_output.finished_req_ids:
                self.crush.forget(request_id)
                self._start_anew(request_id)
        return super()._update_states(scheduler_output)

    def _start_anew(self, request_id: str) -> None:
        self.crush_dropped.pop(request_id, None)
        self.crush_clocks.pop(request_id, None)
        self.crush_failed.discard(request_id)

    def _prepare_inputs(self, scheduler_output: Any, num_scheduled_tokens: np.ndarray) -> Any:
        result = super()._prepare_inputs(scheduler_output, num_scheduled_tokens)
        if self.crush is not None:
            count = self.input_batch.num_reqs
            request_ids = self.input_batch.req_ids[:count]
            dropped = np.array([self.crush_dropped.get(request_id, 0) for request_id in request_ids], dtype=np.int64)
            if dropped.any():
                self._subtract(dropped, num_scheduled_tokens)
            self.crush.begin(self._rows(request_ids, dropped, num_scheduled_tokens))
        return result

    def _subtract(self, dropped: np.ndarray, num_scheduled_tokens: np.ndarray) -> None:
        """Makes lengths and slots those of the cache; positions, made before, stay those of the text."""
        count, tokens = len(dropped), int(num_scheduled_tokens.sum())
        by_row = torch.from_numpy(dropped)
        by_token = torch.from_numpy(np.repeat(dropped, num_scheduled_tokens))
        self.optimistic_seq_lens_cpu[:count] -= by_row.to(self.optimistic_seq_lens_cpu.dtype)
        self.seq_lens[:count] -= by_row.to(self.seq_lens)
        self.input_batch.block_table.compute_slot_mapping(
            count,
            self.query_start_loc.gpu[: count + 1],
            self.positions[:tokens] - by_token.to(self.positions),
        )

    def _rows(self, request_ids: list[str], dropped: np.ndarray, num_scheduled_tokens: np.ndarray) -> list[StepRow]:
        computed = self.input_batch.num_computed_tokens_cpu
        table = self.input_batch.block_table[0].get_device_tensor(len(request_ids))
        first = np.cumsum(num_scheduled_tokens) - num_scheduled_tokens
        rows = []
        for row, request_id in enumerate(request_ids):
            clock = self._clock(request_id)
            if clock is not None:
                before, tokens = int(computed[row]), int(num_scheduled_tokens[row])
                held = before + tokens - int(dropped[row])
                rows.append(StepRow(request_id, clock, before, int(first[row]), tokens, table[row], held))
        return rows

    def _clock(self, request_id: str) -> Clock | None:
        if request_id not in self.crush_clocks:
            assert self.crush is not None
            request = self.requests[request_id]
            self.crush_clocks[request_id] = request_clock(
                self.crush.config, request.num_prompt_tokens, request.sampling_params.extra_args
            )
        return self.crush_clocks[request_id]

    def execute_model(self, scheduler_output: Any, intermediate_tensors: Any = None) -> Any:
        if self.crush is None:
            return super().execute_model(scheduler_output, intermediate_tensors)
        # Those of the step before, whose tokens are on their way to the clients by now. Steps that vLLM makes without
        # its scheduler bring none.
        self._compact(self.crush, getattr(scheduler_output, "crushkv", {}))
        result = super().execute_model(scheduler_output, intermediate_tensors)
        self.crush.end()
        return result

    def _compact(self, crush: Compactor, compactions: Mapping[str, Compaction]) -> None:
        compactions = {name: compaction for name, compaction in compactions.items() if name in self.requests}
        if not compactions:
            return
        failed = crush.compact(compactions, {request_id: self._table(request_id) for request_id in compactions})
        for request_id in _of_all_workers([request_id in failed for request_id in compactions], list(compactions)):
            reason = failed.get(request_id, "another worker cannot rank its tokens")
            crush.fail(request_id, reason)
            self.crush_failed.add(request_id)
            if reason not in self.crush_reasons and len(self.crush_reasons) < MOST_REASONS:
                self.crush_reasons.add(reason)
                logger.warning("crushkv: a request cannot be compressed, and is left in full: %s", reason)
        for request_id, compaction in compactions.items():
            self._replace_blocks(request_id, compaction.blocks)
            self.crush_dropped[request_id] = compaction.eviction.seen - compaction.eviction.kept

    def sample_tokens(self, grammar_output: Any) -> Any:
        if self.crush is None:
            return super().sample_tokens(grammar_output)
        unused = self._without_unused_generators()
        result = super().sample_tokens(grammar_output)
        self.input_batch.generators.update(unused)
        if isinstance(result, AsyncModelRunnerOutput):
            get, report = result.get_output, self._report()
            result.get_output = lambda: _with(get(), report)
        elif isinstance(result, ModelRunnerOutput) and result is not EMPTY_MODEL_RUNNER_OUTPUT:
            _with(result, self._report())
        return result

    def _without_unused_generators(self) -> dict[int, torch.Generator]:
        """Removes and returns the generators of rows whose token is thrown away. They must not advance.

        vLLM lets them advance and rewinds them afterwards, which generators of a CPU cannot. Without its generator such
        a row draws from the common one.
        """
        generators = self.input_batch.generators
        rows = set(np.nonzero(self.discard_request_mask.np[: self.input_batch.num_reqs])[0].tolist())
        rows.update(
            self.input_batch.req_id_to_index[name] for name in self.crush_failed & set(self.input_batch.req_ids)
        )
        return {row: generators.pop(row) for row in rows & generators.keys()}

    def _report(self) -> Report:
        """The report for the scheduler."""
        assert self.crush is not None
        seconds = self.crush.totals.seconds
        report = Report(round((seconds - self.crush_reported) * 1e6), frozenset(self.crush_failed))
        self.crush_reported = seconds
        return report

    def _table(self, request_id: str) -> Tensor:
        blocks = self.requests[request_id].block_ids[0]
        return torch.tensor(blocks, device=self.device)

    def _replace_blocks(self, request_id: str, blocks: list[int]) -> None:
        self.requests[request_id].block_ids[0][:] = blocks
        table, row = self.input_batch.block_table[0], self.input_batch.req_id_to_index[request_id]
        table.clear_row(row)
        table.add_row(blocks, row)


def watch(impl: Any, crush: Compactor, index: int) -> None:
    """Shows the queries of one layer to `crush`, after it has attended.

    vLLM calls `impl.forward` from inside one opaque operation, compiled or not; on the instance, nothing of the
    backend's class is changed.
    """
    attend = impl.forward

    def forward(layer: Any, query: Tensor, *args: Any, **kwargs: Any) -> Any:
        result = attend(layer, query, *args, **kwargs)
        crush.observe(index, query)
        return result

    impl.forward = forward


def paged_layers(modules: dict[str, Any], layout_of: Any) -> dict[str, PagedLayer]:
    """vLLM's attention modules as the compactor sees them, in the order of the model.

    Args:
        layout_of: from a module to its `CacheLayout`, and the dtype of its numbers if they are stored as bytes.
    """
    check_layers(modules)
    layers = {}
    for name in sorted(modules, key=extract_layer_index):
        module = modules[name]
        layout, numbers = layout_of(module)
        layers[name] = PagedLayer(
            index=extract_layer_index(name),
            cache=module.kv_cache,
            layout=layout,
            kv_heads=module.num_kv_heads,
            scaling=module.impl.scale,
            softcap=getattr(module.impl, "logits_soft_cap", None) or None,
            numbers=numbers,
            key_scale=module._k_scale_float,
            value_scale=module._v_scale_float,
        )
    return layers
