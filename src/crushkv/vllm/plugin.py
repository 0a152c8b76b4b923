"""The entry point: vLLM calls `register` in each of its processes."""

from __future__ import annotations

import functools
from typing import Any

from ..errors import ConfigError
from .metrics import install as install_metrics
from .settings import KEY, engine_config, request_config

SCHEDULER = "crushkv.vllm.scheduler.CrushScheduler"
ASYNC_SCHEDULER = "crushkv.vllm.scheduler.CrushAsyncScheduler"
CPU_WORKER = "crushkv.vllm.cpu_worker.CrushCPUWorker"
GPU_WORKER = "crushkv.vllm.gpu_worker.CrushGPUWorker"
CLIENT_SOURCE = f"vllm_xargs[{KEY!r}] (in Python: extra_args)"


def register() -> None:
    """Makes `LLM(...)` and the server read `additional_config["crushkv"]`. Without this key nothing changes.

    vLLM has no hook between a configuration's creation and its use, none for checking a request's `extra_args`, and
    none for metrics of a scheduler, so the methods that do these are wrapped.
    """
    from vllm.engine.arg_utils import EngineArgs
    from vllm.exceptions import VLLMValidationError
    from vllm.v1.engine.input_processor import InputProcessor

    from .support import bytes_per_token

    if hasattr(EngineArgs.create_engine_config, "crushkv"):  # plugins may be loaded more than once
        return
    create, validate = EngineArgs.create_engine_config, InputProcessor._validate_params

    @functools.wraps(create)
    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        vllm_config = create(self, *args, **kwargs)
        enable(vllm_config)
        return vllm_config

    @functools.wraps(validate)
    def validate_params(self: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
        config = engine_config(self.vllm_config.additional_config)
        if config is not None:
            try:
                request_config(
                    config, getattr(params, "extra_args", None), bytes_per_token(self.vllm_config), CLIENT_SOURCE
                )
            except ConfigError as error:  # as what vLLM's server answers with "bad request"
                raise VLLMValidationError(str(error), parameter="vllm_xargs") from None
        return validate(self, params, *args, **kwargs)

    create_engine_config.crushkv = True  # type: ignore[attr-defined]
    EngineArgs.create_engine_config = create_engine_config
    InputProcessor._validate_params = validate_params
    install_metrics()


def enable(vllm_config: Any) -> None:
    """Puts KVCrush's scheduler and worker into a `VllmConfig`, if it is asked for.

    Raises:
        ConfigError: a field of the configuration is not accepted.
        UnsupportedModelError: this engine cannot be compressed; the message says why.
    """
    config = engine_config(vllm_config.additional_config)
    if config is None:
        return
    from vllm.platforms import current_platform

    from .support import check_engine

    check_engine(vllm_config, config)
    # From here on every process reads it from there, whatever its environment.
    vllm_config.additional_config = {**vllm_config.additional_config, KEY: config.to_dict()}
    asynchronous = vllm_config.scheduler_config.async_scheduling
    vllm_config.scheduler_config.scheduler_cls = ASYNC_SCHEDULER if asynchronous else SCHEDULER
    vllm_config.parallel_config.worker_cls = CPU_WORKER if current_platform.is_cpu() else GPU_WORKER
