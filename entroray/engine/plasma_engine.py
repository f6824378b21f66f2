"""vLLM's end of the transfer `plasma`: it loads a packed buffer of weights between two steps of an engine."""

from dataclasses import dataclass
from typing import Any

from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)

from entroray.engine.weight_bytes import Manifest, Payload, check_manifest, unpack


@dataclass
class PlasmaInit(WeightTransferInitInfo):
    """No rendezvous: the manifest of a whole model, against which every update is checked."""

    manifest: Manifest


@dataclass
class PlasmaUpdate(WeightTransferUpdateInfo):
    """One whole model: its manifest and its bytes."""

    manifest: Manifest
    payload: Payload


class PlasmaEngine(WeightTransferEngine[PlasmaInit, PlasmaUpdate]):
    """Engine side: load a packed buffer by vLLM's layerwise reload (CPU linear weights are pre-packed)."""

    init_info_cls = PlasmaInit
    update_info_cls = PlasmaUpdate

    def init_transfer_engine(self, init_info: PlasmaInit) -> None:
        self.expected = init_info.manifest

    def start_weight_update(self) -> None:
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        # The base class waits for an accelerator here; the copy below is done when it returns.
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: PlasmaUpdate) -> None:
        check_manifest(update_info.manifest, self.expected)
        model: Any = self.model
        model.load_weights(unpack(update_info.manifest, update_info.payload))

    def finish_weight_update(self) -> None:
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        finalize_layerwise_reload(self.model, self.model_config)
        self._refresh_tied_head()

    def _refresh_tied_head(self) -> None:
        """A tied head has nothing of its own to load, but on CPU keeps a packed copy of the old weights."""
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

        model: Any = self.model
        parts: list[Any] = [m for m in model.modules() if isinstance(m, VocabParallelEmbedding)]
        embedded = {m.weight.data_ptr() for m in parts if not isinstance(m, ParallelLMHead)}
        heads: list[Any] = [m for m in parts if isinstance(m, ParallelLMHead)]
        for head in heads:
            if head.weight.data_ptr() in embedded:
                head.quant_method.process_weights_after_loading(head)

    def shutdown(self) -> None:
        pass
