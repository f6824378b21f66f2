"""Ranks that send in step: what fails at one engine is raised once every rank is through."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from entroray.workers.weight_sender import Delivery, GeneratorClient


@dataclass
class InStep:
    """vLLM's client on rank 0 of several that share cards with engines by CUDA IPC.

    All ranks meet at every buffer. If rank 0 left at an engine's death, the others would wait for it until
    NCCL gives up, and the learner would be lost with that engine.
    """

    client: GeneratorClient
    failure: Exception | None = None

    def deliver(self, version: int, send_weights: Callable[[], None]) -> Delivery:
        """As `GeneratorClient.deliver`; raises what failed first, and engines are called no more after it."""
        self.failure = None
        delivery = self.client.deliver(version, send_weights)
        if self.failure:
            raise self.failure
        return delivery

    def __getattr__(self, name: str) -> Any:
        return getattr(self.client, name)

    def start_weight_update(self) -> None:
        self._try(self.client.start_weight_update)

    def update_weights(self, update_info: Any) -> None:
        self._try(self.client.update_weights, update_info)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._try(self.client.finish_weight_update, weight_version)

    def _try(self, call: Callable[..., None], *arguments: Any) -> None:
        if self.failure is None:
            try:
                call(*arguments)
            except Exception as error:  # boundary: whatever it is, `deliver` raises it
                self.failure = error
