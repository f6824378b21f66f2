"""`rollout.plan` of the configuration -> how the members of a group are drawn, and what of it is refused."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from entroray.binding import effective_settings, function_name, holds, traits
from entroray.config import RolloutConfig, Sampler
from entroray.errors import ConfigError
from entroray.formula import describe_formula
from entroray.wiring import tool

LISTED = 20
"""vLLM's own limit on how many likeliest tokens it lists."""


def describe_plan(plan: partial) -> str:
    """The plan in words, for a run's header."""
    return f"{function_name(plan)}: {describe_formula(plan)}"


def check_plan(plan: partial, r: RolloutConfig, s: Sampler, engine: Mapping[str, Any]) -> None:
    """ConfigError for a plan that does not fill a group, or that the sampler or the engine rules out."""
    name, declared = function_name(plan), traits(plan)
    if declared.misfit and (problem := declared.misfit(r.group_size, **effective_settings(plan))):
        raise ConfigError(f"rollout.plan {name} with rollout.group_size={r.group_size}: {problem}")
    if not holds(plan, "neutral"):
        _check_alone(name, r)
    if "entropy" in declared.needs:
        _check_notes(name, s, engine)
    if "top_tokens" in declared.needs:
        _check_forks(name, r, s, engine)


def _check_forks(name: str, r: RolloutConfig, s: Sampler, engine: Mapping[str, Any]) -> None:
    listed = engine.get("max_logprobs", LISTED)
    if -1 < listed < r.group_size or r.max_tokens < 2:
        raise ConfigError(
            f"rollout.plan {name} needs {r.group_size} likeliest first tokens (rollout.group_size)"
            f", the engine lists at most {listed}: say +generator.engine.max_logprobs={r.group_size}; and "
            f"rollout.max_tokens={r.max_tokens} must leave room for a second token"
        )
    if s.stop:
        raise ConfigError(
            f"rollout.plan {name} with sampler.stop={list(s.stop)}: a forced first "
            "token that holds such a string would be gone on from, which ends every other response; drop one "
            "of them"
        )


def _check_alone(name: str, r: RolloutConfig) -> None:
    if r.early.extra:
        raise ConfigError(
            f"rollout.plan {name} with rollout.early.extra={r.early.extra}: the last to finish are given up, "
            "and branches on their parents; drop one of them"
        )
    if tool.uses_tool(r.tool):
        raise ConfigError(
            f"rollout.plan {name} with rollout.tool: a branch may begin within a call or its answer; drop one"
        )


def _check_notes(name: str, s: Sampler, engine: Mapping[str, Any]) -> None:
    if s.insert is not None:
        raise ConfigError(
            f"rollout.plan {name} with sampler.insert={s.insert!r}: a token is inserted once "
            "in each draw, so a branch could insert again; sampler.insert=null, or rollout=plain"
        )
    if engine.get("speculative_config"):
        raise ConfigError(
            f"rollout.plan {name} reads entropies that a logits processor notes, and with speculative "
            "decoding vLLM takes none: drop generator.engine.speculative_config, or rollout=plain"
        )
