"""CPU threads of an engine's steps: one where a second costs more to wake than it computes."""

from typing import Any

from torch import get_num_threads, set_num_threads  # vLLM on a CPU replaces torch's by one that does nothing

SMALL = 6e7
"""Multiply-adds of a step up to which one thread is quicker: 64 samples of the tiny model."""


class StepThreads:
    """Numbers of threads by the samples under way; steps of an engine on a GPU are left alone."""

    def __init__(self, llm: Any):
        from vllm.platforms import current_platform

        config = llm.model_config
        layers = config.get_num_layers(llm.llm_engine.vllm_config.parallel_config)
        width = config.get_hidden_size()
        self.work = 12 * layers * width**2 + width * config.get_vocab_size()
        """About the multiply-adds of one token."""
        self.llm, self.cpu = llm, current_platform.is_cpu()
        self.most = self.now = get_num_threads()

    def fit(self, samples: int) -> None:
        """Take as many threads as a step with `samples` samples is worth; in the thread that steps."""
        self.take(self.most if samples * self.work > SMALL else 1)

    def take(self, wanted: int) -> None:
        """Go on with `wanted` threads."""
        if wanted != self.now and self.cpu:
            self.now = wanted
            self.llm.collective_rpc(_use_threads, args=(wanted,))


def _use_threads(worker: Any, number: int) -> None:
    set_num_threads(number)
