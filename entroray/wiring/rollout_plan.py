"""`rollout.plan` of the configuration -> how the members of a group are drawn, and what of it is refused."""

from functools import partial

from entroray.binding import bind, effective_settings, function_name, traits
from entroray.config import Config, RolloutConfig
from entroray.errors import ConfigError
from entroray.formula import describe_formula
from entroray.rollout import plans
from entroray.wiring import tool

INDEPENDENT = {"fn": "independent"}
LISTED = 20
"""vLLM's own limit on how many likeliest tokens it lists."""


def bind_plan(rollout: RolloutConfig) -> partial:
    """The plan as configured; ConfigError names what is unknown or mistyped."""
    return bind(plans, rollout.plan or INDEPENDENT)


def reads_entropy(rollout: RolloutConfig) -> bool:
    """Whether the engines must note the entropy of every distribution they draw from."""
    return "entropy" in traits(bind_plan(rollout)).needs


def makes_siblings(rollout: RolloutConfig) -> bool:
    """Whether responses of a group share tokens."""
    return traits(bind_plan(rollout)).siblings


def branches(rollout: RolloutConfig) -> bool:
    """Whether members of a group may share their first tokens."""
    return bind_plan(rollout).func is not plans.independent


def describe_plan(rollout: RolloutConfig) -> str:
    """The plan in words, for a run's header."""
    bound = bind_plan(rollout)
    return f"{function_name(bound)}: {describe_formula(bound)}"


def check_plan(config: Config) -> None:
    """ConfigError for a plan that does not fill a group, or that the sampler or the engine rules out."""
    bound, r = bind_plan(config.rollout), config.rollout
    s, size, name = effective_settings(bound), r.group_size, function_name(bound)
    if bound.func is plans.branching and s["roots"] >= size:
        raise ConfigError(
            f"rollout.plan.roots={s['roots']} leaves no branches in rollout.group_size={size}: fewer roots, "
            "a larger group, or rollout=plain"
        )
    _check_places(bound, size)
    if bound.func is plans.tree and (total := s["roots"] * (1 + s["width"]) ** s["depth"]) != size:
        raise ConfigError(
            f"rollout.plan: roots={s['roots']} (1 + width={s['width']})^depth={s['depth']} makes {total} "
            f"responses and rollout.group_size={size}: make them equal"
        )
    if bound.func is not plans.independent:
        _check_alone(config, name)
    if reads_entropy(r):
        _check_notes(config, name)
    if bound.func is plans.first_token_forks:
        _check_forks(config)


def _check_forks(config: Config) -> None:
    listed, r = config.generator.engine.get("max_logprobs", LISTED), config.rollout
    if -1 < listed < r.group_size or r.max_tokens < 2:
        raise ConfigError(
            f"rollout.plan first_token_forks needs {r.group_size} likeliest first tokens (rollout.group_size)"
            f", the engine lists at most {listed}: say +generator.engine.max_logprobs={r.group_size}; and "
            f"rollout.max_tokens={r.max_tokens} must leave room for a second token"
        )
    if config.sampler.stop:
        raise ConfigError(
            f"rollout.plan first_token_forks with sampler.stop={list(config.sampler.stop)}: a forced first "
            "token that holds such a string would be gone on from, which ends every other response; drop one "
            "of them"
        )


def _check_places(bound: partial, size: int) -> None:
    """ConfigError for more places than any response has branches to begin at them."""
    if bound.func not in (plans.branching, plans.tree):
        return
    settings = effective_settings(bound)
    roots = settings["roots"]
    branches = settings["width"] if bound.func is plans.tree else -(-(size - roots) // roots)
    if settings["places"] > branches:
        raise ConfigError(
            f"rollout.plan.places={settings['places']}: a response has {branches} "
            f"branch{'es' if branches > 1 else ''} here, so further places are never used; say "
            f"{branches}, or ask for more branches"
        )


def _check_alone(config: Config, name: str) -> None:
    if config.rollout.early.extra:
        raise ConfigError(
            f"rollout.plan {name} with rollout.early.extra={config.rollout.early.extra}: the last to finish "
            "are given up, and branches on their parents; drop one of them"
        )
    if tool.uses_tool(config):
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
