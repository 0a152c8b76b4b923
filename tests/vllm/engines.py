"""vLLM engines inside the test process, where their block pool and workers can be looked at."""

from __future__ import annotations

import gc
import importlib.resources
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.utils.math_utils import cdiv

from crushkv import KVCrush
from crushkv.core.zones import divide
from crushkv.hf.layer import CrushLayer
from crushkv.vllm.compactor import Compactor

BLOCK = 32
MOST_STEPS = 2000
_numbers = itertools.count()


class Engine:
    """One `LLM` in this process; `crush` fields configure KVCrush, None leaves it out."""

    def __init__(self, model: Path, crush: dict[str, Any] | None, **options: Any) -> None:
        defaults: dict[str, Any] = {
            "dtype": "float32",
            "enforce_eager": True,
            "block_size": BLOCK,
            "max_model_len": 1408,
            "max_num_seqs": 16,
            "max_num_batched_tokens": 4096,
            "num_gpu_blocks_override": 400,
            "enable_prefix_caching": False,
            "kv_cache_memory_bytes": 2**29,
            "seed": 0,
        }
        additional = {} if crush is None else {"additional_config": {"crushkv": crush}}
        self.llm = LLM(model=str(model), **{**defaults, **additional, **options})
        core = self.llm.llm_engine.engine_core.engine_core
        self.scheduler: Any = core.scheduler
        self.runner: Any = core.model_executor.driver_worker.worker.model_runner
        self.manager: Any = self.scheduler.kv_cache_manager.coordinator.single_type_managers[0]
        self.pool: Any = self.scheduler.kv_cache_manager.block_pool
        self.hits: dict[str, int] = {}  # tokens that came out of the prefix cache, by request
        self.preempted: set[str] = set()
        self.free_at_start = self.pool.get_num_free_blocks()

    @property
    def crush(self) -> Compactor:
        assert self.runner.crush is not None
        return self.runner.crush

    def add(self, prompt: list[int], new: int, **parameters: Any) -> str:
        """Adds a request for `new` greedy tokens; returns its id, which vLLM makes longer inside."""
        sampling = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, **parameters)
        name = f"r{next(_numbers)}"
        self.llm.llm_engine.add_request(name, {"prompt_token_ids": prompt}, sampling)
        return name

    def step(self) -> dict[str, list[int]]:
        """One step; the tokens so far of each request that has something to say."""
        outputs = self.llm.llm_engine.step()
        self.hits |= {output.request_id: output.num_cached_tokens or 0 for output in outputs}
        self.preempted |= {r.request_id for r in self.scheduler.running if r.num_preemptions}
        return {output.request_id: list(output.outputs[0].token_ids) for output in outputs}

    def generate(
        self,
        prompts: list[list[int]],
        new: int,
        after_step: Callable[[Engine], None] | None = None,
        **parameters: Any,
    ) -> list[list[int]]:
        """Greedy tokens of all prompts, which are added at once."""
        names = [self.add(prompt, new, **parameters) for prompt in prompts]
        answers: dict[str, list[int]] = {}
        for _ in range(MOST_STEPS):
            if not self.llm.llm_engine.has_unfinished_requests():
                return [answers[name] for name in names]
            answers |= self.step()
            if after_step is not None:
                after_step(self)
        raise AssertionError(f"not done after {MOST_STEPS} steps")

    def check_blocks(self) -> None:
        """Every request holds the blocks that its schedule says, and no block is held by nobody."""
        held = 0
        for request in self.scheduler.running:
            name = request.request_id
            blocks = self.manager.req_to_blocks[name]
            tokens = self.manager.held(name, request.num_computed_tokens)
            assert len(blocks) == cdiv(tokens, BLOCK)
            schedule = self.manager.schedules.get(name)
            assert tokens <= (
                request.num_tokens if schedule is None else schedule.most_held(request.num_computed_tokens)
            )
            held += len(blocks)
        in_use = self.free_at_start - self.pool.get_num_free_blocks()
        assert in_use <= held if self.manager.enable_caching else in_use == held  # prefixes are shared

    def check_empty(self) -> None:
        """Nothing is left of any request: not a block, not a state on either side."""
        # Workers hear of the end of a request with the next step.
        if getattr(self.runner, "crush", None) is not None:
            self.generate([[1, 2, 3]], 1)
            self.generate([[1, 2, 3]], 1)
            assert len(self.runner.crush_clocks) <= 1 and len(self.runner.crush_dropped) == 0
            assert not self.manager.schedules and not self.manager.dropped
            assert not self.manager.reservations and not self.manager.due and not self.runner.crush_failed
        assert self.pool.get_num_free_blocks() == self.free_at_start
        assert not any(self.manager.req_to_blocks.values())


@contextmanager
def engine(model: Path, crush: dict[str, Any] | None, **options: Any) -> Iterator[Engine]:
    """An engine that is gone afterwards, so that the next one can be made in this process."""
    made = Engine(model, crush, **options)
    try:
        yield made
    finally:
        made.llm.llm_engine.engine_core.shutdown()
        made.__dict__.clear()
        cleanup_dist_env_and_memory()
        gc.collect()


def document_prompts(model: Path, lengths: list[int], shared: int) -> list[list[int]]:
    """Token ids out of the bundled document: the first `shared` are those of all prompts, then each goes its way."""
    text = (importlib.resources.files("crushkv.demo") / "document.txt").read_text(encoding="utf-8")
    ids = AutoTokenizer.from_pretrained(str(model))(text, add_special_tokens=False)["input_ids"]
    return [ids[:shared] + ids[shared + 500 * i :][: length - shared] for i, length in enumerate(lengths)]


@contextmanager
def evicting_blocks(size: int = BLOCK) -> Iterator[None]:
    """Inside, the Transformers integration leaves out every eviction that would free no block of vLLM's."""
    evict = CrushLayer.evict

    def evict_where_a_block_comes_free(layer: CrushLayer, call: Any) -> None:
        (group,) = layer.groups
        count, seen = group.real_tokens()
        config = layer.plan.config
        budget = layer.plan.tokens_kept(layer.index, None, seen, count, group.storage.sizes()).minimum(count)
        kept = divide(count, budget, config).kept
        if cdiv(int(kept), size) == cdiv(int(count), size):
            layer.last_point = layer.seen
        else:
            evict(layer, call)

    with patch.object(CrushLayer, "evict", evict_where_a_block_comes_free):
        yield


class Reference:
    """What crushkv's Transformers integration generates; kept, because several tests ask for the same."""

    def __init__(self, model: Path) -> None:
        self.model: Any = AutoModelForCausalLM.from_pretrained(str(model), dtype=torch.float32).eval()
        self.model.generation_config.eos_token_id = None  # as `ignore_eos` in vLLM
        self._known: dict[str, list[int]] = {}

    def generate(self, crush: dict[str, Any], prompts: list[list[int]], new: int) -> list[list[int]]:
        return [self._one(crush, prompt, new) for prompt in prompts]

    def _one(self, crush: dict[str, Any], prompt: list[int], new: int) -> list[int]:
        key = repr((sorted(crush.items()), prompt, new))
        if key not in self._known:
            ids = torch.tensor([prompt])
            with evicting_blocks(), KVCrush(**crush)(self.model):
                output = self.model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    do_sample=False,
                    max_new_tokens=new,
                    pad_token_id=0,
                )
            self._known[key] = output[0, len(prompt) :].tolist()
        return self._known[key]


def small_model(folder: Path, vocabulary: int = 512) -> Path:
    """A random-weight Llama whose heads divide by two, with attention that prefers some tokens to others."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=2048,
        initializer_range=0.2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return folder


def random_prompts(lengths: list[int], seed: int = 0) -> list[list[int]]:
    """For the random-weight model, which has no tokenizer."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 512, (length,), generator=generator).tolist() for length in lengths]
