"""What single numbers and names of the settings may be; rules between several stand in `settings.check`."""

from collections.abc import Callable
from operator import attrgetter
from typing import Any, NamedTuple

from entroray.config import Config
from entroray.errors import ConfigError


class Bound(NamedTuple):
    """What a number must be, in words and as a test that NaN fails."""

    words: str
    holds: Callable[[Any], bool]


COUNT = Bound("at least 1", lambda x: x >= 1)
NATURAL = Bound("at least 0", lambda x: x >= 0)
POSITIVE = Bound("above 0", lambda x: x > 0)
SHARE = Bound("between 0 and 1", lambda x: 0 <= x <= 1)
COUNT_OR_NULL = Bound("at least 1, or null", lambda x: x is None or x >= 1)
NATURAL_OR_NULL = Bound("at least 0, or null", lambda x: x is None or x >= 0)
BAND = Bound("two shares, the lower first, both in [0, 1]", lambda x: len(x) == 2 and 0 <= x[0] <= x[1] <= 1)

NUMBERS = {
    "run.steps": COUNT,
    "run.tokens": NATURAL,
    "model.warm_start.band": BAND,
    "model.warm_start.max_steps": COUNT,
    "model.warm_start.rows_per_step": COUNT,
    "model.warm_start.check_every": COUNT,
    "data.heldout": SHARE,
    "data.demonstrations": SHARE,
    "data.max_prompt": COUNT,
    "reward.deadline": POSITIVE,
    "reward.max_failed": SHARE,
    "sampler.temperature": NATURAL,
    "sampler.top_p": Bound("above 0 and at most 1", lambda x: 0 < x <= 1),
    "sampler.top_k": Bound("at least 1, or 0 or -1 for all tokens", lambda x: x >= -1),
    "rollout.group_size": COUNT,
    "rollout.groups_per_step": COUNT,
    "rollout.prompts.retire": SHARE,
    "rollout.prompts.band": BAND,
    "rollout.prompts.outside": SHARE,
    "rollout.second.factor": COUNT,
    "rollout.replay.tokens": NATURAL,
    "rollout.early.extra": NATURAL,
    "rollout.repetition.count": Bound("0 (off) or at least 2", lambda x: x == 0 or x >= 2),
    "rollout.max_tokens": COUNT,
    "rollout.deadline": POSITIVE,
    "rollout.turns": NATURAL,
    "driver.max_lag": NATURAL,
    "driver.refill_limit": NATURAL,
    "driver.stall": POSITIVE,
    "driver.call_deadline": POSITIVE,
    "driver.probe.every": NATURAL,
    "driver.probe.tolerance": NATURAL,
    "learner.ranks": COUNT,
    "learner.updates_per_rollout": COUNT,
    "learner.token_budget": COUNT,
    "learner.lr": NATURAL,
    "learner.weight_decay": NATURAL,
    "learner.betas": Bound(
        "two numbers from 0 to below 1", lambda x: len(x) == 2 and all(0 <= beta < 1 for beta in x)
    ),
    "learner.max_grad_norm": NATURAL,
    "learner.warmup_updates": NATURAL,
    "learner.reset_after": NATURAL,
    "learner.threads": NATURAL_OR_NULL,
    "generator.replicas": COUNT,
    "generator.tensor_parallel": COUNT,
    "generator.restarts": NATURAL,
    "generator.threads": NATURAL_OR_NULL,
    "verifier.replicas": COUNT,
    "verifier.slots": COUNT,
    "verifier.memory_mb": COUNT_OR_NULL,
    "cluster.cpus.generator": NATURAL,
    "cluster.cpus.learner": NATURAL,
    "cluster.cpus.verifier": NATURAL,
    "cluster.gpus_per_generator": NATURAL,
    "cluster.gpus_per_learner": NATURAL,
    "observe.tokens.every": NATURAL,
    "observe.diagnosis.every": NATURAL,
    "observe.prediction.every": NATURAL,
    "checkpoint.every": NATURAL,
    "checkpoint.keep": COUNT,
    "evaluate.prompts": COUNT,
    "evaluate.samples": COUNT,
    "evaluate.cot": NATURAL,
    "evaluate.every": NATURAL,
}
"""What each must be; rules between several settings are in `check_config`."""

NAMES: dict[str, tuple[object, ...]] = {
    "run.resume": ("never", "auto"),
    "model.dtype": ("float32", "bfloat16"),
    "rollout.second.when": ("at_once", "next_time"),
    "rollout.surplus": ("by_lag", "keep", "drop"),
    "driver.stale": ("wait", "drop"),
    "learner.zero_stage": (0, 1, 2, 3),
    "learner.schedule": (
        "linear",
        "cosine",
        "cosine_with_restarts",
        "polynomial",
        "constant",
        "constant_with_warmup",
        "inverse_sqrt",
    ),
    "generator.transfer": ("plasma", "nccl", "ipc"),
}
"""What may be chosen. A schedule is one that transformers makes of two numbers, warm-up and all updates."""


def check_bounds(config: Config) -> None:
    """ConfigError for a number out of its bounds, or a name that is no choice."""
    for path, bound in NUMBERS.items():
        value = attrgetter(path)(config)
        if not bound.holds(value):
            raise ConfigError(f"{path}={value} must be {bound.words}")
    for path, choices in NAMES.items():
        value = attrgetter(path)(config)
        if value not in choices:
            *most, last = map(str, choices)
            raise ConfigError(f"{path}={value}: choose {', '.join(most)} or {last}")
