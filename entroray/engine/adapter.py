"""A LoRA adapter that an engine serves over its base, replaced between two steps by vLLM's in-place load."""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from entroray.engine.weight_bytes import check_manifest, unpack
from entroray.errors import SyncError
from entroray.policy.lora import read_config, write_adapter

ADAPTER = "adapter"
"""Value of `generator.transfer`: adapters are sent, by Ray's object store."""
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Values of vLLM's max_lora_rank."""


def adapter_options(rank: int) -> dict[str, Any]:
    """vLLM's options for an engine that serves an adapter of this rank."""
    return {"enable_lora": True, "max_lora_rank": next((n for n in RANKS if n >= rank), rank)}


class AdapterWeights:
    """Mixed into vLLM's `LLM`: the calls by which it takes weights replace its adapter, and the base stays.

    Requests in flight keep the adapter's number, so that they go on with the new weights, as they do when all
    weights are replaced.
    """

    llm_engine: Any
    update_weight_version: Any
    adapter: Any = None
    """vLLM's LoRARequest, which goes with every request; None: the base answers, until an adapter is sent."""

    def init_weight_transfer_engine(self, request: Mapping[str, Any]) -> None:
        self.expected, self.config = request["init_info"]["manifest"], request["init_info"]["config"]

    def shutdown_weight_transfer_engine(self) -> None:
        """Nothing was opened."""

    def start_weight_update(self) -> None:
        """The base stays as it is."""

    def update_weights(self, request: Mapping[str, Any]) -> None:
        """Load what was sent; vLLM reads adapters from files alone, and keeps what it has read."""
        manifest, payload = request["update_info"]["manifest"], request["update_info"]["payload"]
        check_manifest(manifest, self.expected)
        with tempfile.TemporaryDirectory(prefix="entroray-adapter-") as folder:
            write_adapter(Path(folder), self.config, unpack(manifest, payload))
            if not self.llm_engine.add_lora(named_adapter(folder, load_inplace=True)):
                raise SyncError("vLLM did not load the adapter that was sent: set generator.transfer=plasma")
            self.adapter = named_adapter(folder)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        if weight_version is not None:
            self.update_weight_version(weight_version)


def named_adapter(folder: str, **how: Any) -> Any:
    """vLLM's request for the one adapter that an engine serves."""
    from vllm.lora.request import LoRARequest

    return LoRARequest("policy", 1, folder, **how)


def engine_class(options: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The class of vLLM that serves a model with these options, and the options it is made with.

    A `model` that is the folder of an adapter is served by its base with it.
    """
    from vllm import LLM

    folder = options["model"]
    config = read_config(folder)
    if config is None and not options.get("enable_lora"):
        return LLM, dict(options)
    mixed = type("AdapterLLM", (AdapterWeights, LLM), {"adapter": named_adapter(folder) if config else None})
    own = {"model": config["base_model_name_or_path"], **adapter_options(config["r"])} if config else {}
    return mixed, {**options, **own}
