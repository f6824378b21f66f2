"""The learner's client of engines, over `processes` in place of Ray."""

from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

from entroray.errors import InfrastructureError
from entroray.workers.weight_sender import GeneratorClient
from tests.gpu.processes import DiedError, answers


class Client(GeneratorClient):
    """That of a run, but for how it waits."""

    def _all(self, calls: Sequence["Future[Any]"], action: str) -> list[Any]:
        try:
            return answers(calls, getattr(self, "limits", {}).get(action, self.deadline))
        except (DiedError, TimeoutError) as error:
            raise InfrastructureError(f"{action} weights of version {self.version}: {error!r}") from error
