"""What of the pieces can be seen without a card: python -m tests.gpu.trial, which trial.sh begins."""

import importlib
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

COMPILED = (
    "vllm._C_stable_libtorch",
    "vllm.cumem_allocator",
    "vllm.vllm_flash_attn._vllm_fa3_C",
    "ray._raylet",
)
PURE = ("deepspeed", "hydra", "omegaconf", "entroray.cli", "entroray.cli.train", "entroray.wiring.actors")


def seen(what: str, look: Callable[[], object]) -> bool:
    """Print whether it went, and how long it took."""
    began = time.perf_counter()
    try:
        found = look()
    except Exception as error:  # boundary: what fails is what the trial is to tell
        lines = traceback.format_exc().strip().splitlines()
        print(f"FAILED  {what}: {type(error).__name__}: {error}\n        " + "\n        ".join(lines[-9:-1]))
        return False
    print(f"seen    {what} ({time.perf_counter() - began:.1f} s) {found or ''}", flush=True)
    return True


def platform() -> str:
    from vllm.platforms import current_platform

    return type(current_platform).__name__


def llm() -> str:
    from vllm import LLM

    return LLM.__module__


class Adder:
    """What Ray is to run."""

    def add(self, a: int, b: int) -> int:
        return a + b


def ray() -> str:
    """An actor of a Ray that is started here."""
    import ray

    ray.init(address="local", num_cpus=1, include_dashboard=False, logging_level="ERROR")
    try:
        actor = ray.remote(Adder).remote()
        return f"an actor says {ray.get(actor.add.remote(1, 2), timeout=60)}"
    finally:
        ray.shutdown()


def engine() -> None:
    """To where a card is needed."""
    from vllm import LLM

    from tests.gpu.part_e import GRAPHS
    from tests.gpu.shapes import served_folder

    with tempfile.TemporaryDirectory() as place:
        path = served_folder("0.5B", Path(place), weights=False)
        try:
            LLM(model=path, load_format="dummy", max_model_len=512, **GRAPHS)
        except Exception:  # boundary: whatever stands where a card is asked for
            print("an engine ends at:\n" + "\n".join(traceback.format_exc().strip().splitlines()[-12:]))


def main() -> None:
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "DS_ACCELERATOR": "cuda",
    }
    went = [seen("from vllm import LLM", llm), seen("platform", platform)]
    went += [
        seen(name, lambda name=name: importlib.import_module(name) and "") for name in (*COMPILED, *PURE)
    ]
    went.append(seen("ray", ray))
    engine()
    sys.exit(not all(went))


if __name__ == "__main__":
    main()
