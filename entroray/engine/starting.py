"""How a vLLM engine starts: which of vLLM's two runners serves it, and a card that is still being left."""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from entroray.engine.adapter import engine_class
from entroray.engine.vllm_request import PROCESSOR, Noted
from entroray.errors import ConfigError

PROCESSOR_V2 = "entroray.engine.logits_processor_v2:Shaping"
"""`PROCESSOR` for vLLM's runner V2, which GPUs take."""
STILL_TAKEN = "Free memory on device"
"""How vLLM, which has no type for it, begins to say that a card has no room."""
OWN_WEIGHTS = ("enable_lora", "speculative_config", "quantization")
"""vLLM's options of engines that hold weights which no sync brings."""
LEAVING = 20.0
"""Seconds given to processes of an engine that was killed to leave their cards."""

ANSWER = 20.0
"""Seconds in which a worker of an engine at rest answers."""


def start_llm(**options: Any) -> Any:
    """vLLM's `LLM` with these options; ConfigError if they ask for what its runner cannot do."""
    options = {"async_scheduling": False, "logprobs_mode": "processed_logprobs", **options}
    if names := options.get("logits_processors"):
        options["logits_processors"] = fit_processors(names, ahead=options["async_scheduling"])
    served, options = engine_class(options)
    return try_twice(lambda: served(**options))


def fit_processors(names: Sequence[str], *, ahead: bool) -> list[str]:
    """Logits processors for the runner that will serve: V2 if vLLM may take it and all of them fit it.

    `ahead` is `generator.overlap`, with which V1's would see tokens that are not known yet.
    """
    from vllm import envs
    from vllm.triton_utils import HAS_TRITON

    if HAS_TRITON and envs.VLLM_USE_V2_MODEL_RUNNER is not False and all(map(_fits_v2, names)):
        return [PROCESSOR_V2 if name == PROCESSOR else name for name in names]
    if ahead:
        raise ConfigError(
            f"generator.overlap=true: vLLM's runner V1 serves logits processors {list(names)}: set "
            "generator.overlap=false, or have those of generator.engine.logits_processors be V2's"
        )
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"
    return list(names)


def _fits_v2(name: str) -> bool:
    from vllm.utils.import_utils import resolve_obj_by_qualname
    from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor

    return name == PROCESSOR or issubclass(resolve_obj_by_qualname(name.replace(":", ".")), LogitsProcessor)


def runner(llm: Any) -> str:
    """The runner that serves; V1 and V2 draw other samples with one seed."""
    return "V2" if llm.llm_engine.vllm_config.use_v2_model_runner else "V1"


def ask_workers(llm: Any) -> float:
    """When (monotonic) every worker of an engine that rests has answered; TimeoutError if one is frozen."""
    llm.collective_rpc("check_health", timeout=ANSWER)
    return time.monotonic()


def drain_notes(llm: Any, runner: str, names: Sequence[str]) -> list[Noted | None]:
    """What samplers of this runner noted on requests that are over, once; every rank has the same."""
    if runner == "V2":
        from entroray.engine.logits_processor_v2 import drain
    else:
        from entroray.engine.logits_processor import drain
    return llm.collective_rpc(drain, args=(list(names),))[0]


def sleep_level(options: Mapping[str, Any]) -> int:
    """2 drops weights, which the next sync brings; 1 keeps those that none brings in the host's memory."""
    return 1 if any(map(options.get, OWN_WEIGHTS)) else 2


def try_twice(start: Callable[[], Any]) -> Any:
    """What `start` gives; once more after `LEAVING` seconds if the card's memory was taken."""
    try:
        return start()
    except ValueError as error:
        if not str(error).startswith(STILL_TAKEN):
            raise
    from vllm.distributed import cleanup_dist_env_and_memory

    cleanup_dist_env_and_memory()
    time.sleep(LEAVING)
    return start()
