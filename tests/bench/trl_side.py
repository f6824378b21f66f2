"""TRL's GRPOTrainer behind a gate: python tests/bench/trl_side.py JSON, by tests/bench/side_by_side.py.

Generation is transformers' own, the only one TRL has on a CPU. Nothing is logged, reported or saved, and no
reference model is kept: what is left of a step is drawing, scoring nothing, one update.
"""

import json
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from tests.bench.gate import Gate
from tests.bench.reward import parity

PHASES: Counter[str] = Counter()
"""Seconds, since they were last told."""


class Held(TrainerCallback):
    """At the end of every step: tells what it came to, and waits."""

    def __init__(self) -> None:
        self.gate, self.tokens, self.began = Gate(), 0.0, time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        whole = {"seconds/step": time.perf_counter() - self.began}
        self.gate.step(self.tokens, dict(PHASES) | whole)
        self.tokens, self.began = 0.0, time.perf_counter()
        PHASES.clear()


class Trainer(GRPOTrainer):
    """Times what a step spends on drawing."""

    def _generate(self, *arguments: Any, **named: Any) -> Any:
        began = time.perf_counter()
        try:
            return super()._generate(*arguments, **named)
        finally:
            PHASES["seconds/sample"] += time.perf_counter() - began


def main() -> None:
    asked = json.loads(sys.argv[1])
    torch.set_num_threads(asked["threads"])
    tokenizer = AutoTokenizer.from_pretrained(asked["model"])
    rows = Path(asked["questions"]).read_text().splitlines()
    questions = [json.loads(row)["question"] for row in rows]
    held = Held()

    def reward(completions: list[Any], completion_ids: list[list[int]], **_: Any) -> list[float]:
        held.tokens += sum(map(len, completion_ids))
        return [parity(c[0]["content"], None) for c in completions]

    trainer = Trainer(
        model=asked["model"],
        reward_funcs=reward,
        args=GRPOConfig(
            output_dir=asked["folder"],
            use_cpu=True,
            bf16=False,
            fp16=False,
            model_init_kwargs={"attn_implementation": "sdpa", "dtype": "float32"},
            gradient_checkpointing=False,
            beta=0.0,
            logging_strategy="no",
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            seed=0,
            **asked["settings"],
        ),
        train_dataset=Dataset.from_list([{"prompt": [{"role": "user", "content": q}]} for q in questions]),
        processing_class=tokenizer,
        callbacks=[held],
    )
    trainer.train()


if __name__ == "__main__":
    main()
