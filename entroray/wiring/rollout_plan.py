"""`rollout.plan` of the configuration -> how the members of a group are drawn, and what of it is refused."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from entroray.binding import bind, effective_settings, function_name, holds, traits
from entroray.config import Config
from entroray.errors import ConfigError
from entroray.formula import describe_formula
from entroray.rollout import plans
from entroray.wiring import tool

INDEPENDENT = {"fn": "independent"}
LISTED = 20
"""vLLM's own limit on how many likeliest tokens it lists."""


def bind_plan(plan: Mapping[str, Any], packages: Sequence[str]) -> partial:
    """The plan as configured; ConfigError names what is unknown or mistyped."""
    return bind(plans, plan or INDEPENDENT, packages)


def reads_entropy(plan: Mapping[str, Any], packages: Sequence[str]) -> bool:
    """Whether the engines must note the entropy of every distribution they draw from."""
    return "entropy" in traits(bind_plan(plan, packages)).needs


def makes_siblings(plan: Mapping[str, Any], packages: Sequence[str]) -> bool:
    """Whether responses of a group share tokens."""
    return traits(bind_plan(plan, packages)).siblings


def branches(plan: Mapping[str, Any], packages: Sequence[str]) -> bool:
    """Whether members of a group may begin otherwise than at the prompt."""
    return not holds(bind_plan(plan, packages), "neutral")


def describe_plan(plan: Mapping[str, Any], packages: Sequence[str]) -> str:
    """The plan in words, for a run's header."""
    bound = bind_plan(plan, packages)
    return f"{function_name(bound)}: {describe_formula(bound)}"


def check_plan(config: Config) -> None:
    """ConfigError for a plan that does not fill a group, or that the sampler or the engine rules out."""
    bound = bind_plan(config.rollout.plan, config.packages)
    size, name, declared = config.rollout.group_size, function_name(bound), traits(bound)
    if declared.misfit and (problem := declared.misfit(size, **effective_settings(bound))):
        raise ConfigError(f"rollout.plan {name} with rollout.group_size={size}: {problem}")
    if not holds(bound, "neutral"):
        _check_alone(config, name)
    if "entropy" in declared.needs:
        _check_notes(config, name)
    if "top_tokens" in declared.needs:
        _check_forks(config, name)


def _check_forks(config: Config, name: str) -> None:
    listed, r = config.generator.engine.get("max_logprobs", LISTED), config.rollout
    if -1 < listed < r.group_size or r.max_tokens < 2:
        raise ConfigError(
            f"rollout.plan {name} needs {r.group_size} likeliest first tokens (rollout.group_size)"
            f", the engine lists at most {listed}: say +generator.engine.max_logprobs={r.group_size}; and "
            f"rollout.max_tokens={r.max_tokens} must leave room for a second token"
        )
    if config.sampler.stop:
        raise ConfigError(
            f"rollout.plan {name} with sampler.stop={list(config.sampler.stop)}: a forced first "
            "token that holds such a string would be gone on from, which ends every other response; drop one "
            "of them"
        )


def _check_alone(config: Config, name: str) -> None:
    if config.rollout.early.extra:
        raise ConfigError(
            f"rollout.plan {name} with rollout.early.extra={config.rollout.early.extra}: the last to finish "
            "are given up, and branches on their parents; drop one of them"
        )
    if tool.uses_tool(config.rollout.tool):
        raise ConfigError(
            f"rollout.plan {name} with rollout.tool: a branch may begin within a call or its answer; drop one"
        )


def _check_notes(config: Config, name: str) -> None:
    if config.sampler.insert is not None:
        raise ConfigError(
            f"rollout.plan {name} with sampler.insert={config.sampler.insert!r}: a token is inserted once "
            "in each draw, so a branch could insert again; sampler.insert=null, or rollout=plain"
        )
    if config.generator.engine.get("speculative_config"):
        raise ConfigError(
            f"rollout.plan {name} reads entropies that a logits processor notes, and with speculative "
            "decoding vLLM takes none: drop generator.engine.speculative_config, or rollout=plain"
        )
