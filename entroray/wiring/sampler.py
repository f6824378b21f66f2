"""`sampler` of the configuration -> how the engines draw, and what of it training refuses."""

from dataclasses import replace
from typing import Any

import torch

from entroray.binding import function_name, holds
from entroray.config import Config
from entroray.errors import ConfigError, PreflightError
from entroray.formula import describe_formula
from entroray.rollout import reshape
from entroray.types import Draw
from entroray.wiring import rollout_plan, selection, tool

REPORTED = "processed_logprobs"
"""vLLM's name for log-probs of the distribution really sampled from."""
MINIMUM = 0.01
"""Lowest temperature above 0: vLLM draws at this one if a lower one is asked for, and does not say so."""


def reshapes(config: Config) -> bool:
    """Whether a first draw may be from anything but the policy's own distribution."""
    return _reshapes(config) or selection.draws_hotter(config.rollout, "next_time")


def own_rule(config: Config) -> list[Any]:
    """The user's logits processors; nobody knows what they make of a distribution."""
    return list(config.generator.engine.get("logits_processors") or ())


def _reshapes(config: Config) -> bool:
    return _has_rule(config) or bool(own_rule(config))


def _has_rule(config: Config) -> bool:
    """Whether `sampler.rule` changes the distribution that tokens are drawn from."""
    return not holds(reshape.build_rule(config.sampler.rule, config.packages), "neutral")


def notes_entropy(config: Config) -> bool:
    """Whether the engines need the logits processor that notes and reshapes."""
    return _notes_first(config) or config.rollout.second.factor != 1.0


def _notes_first(config: Config) -> bool:
    """Whether first draws are noted, if only by a rule that changes nothing."""
    return _has_rule(config) or rollout_plan.reads_entropy(config.rollout.plan, config.packages)


def plain_draw(config: Config) -> Draw:
    """The policy's own distribution at `sampler.temperature`; 0 is greedy."""
    s = config.sampler
    return Draw(
        s.temperature,
        config.rollout.max_tokens,
        tool.stop_strings(config.sampler.stop, config.rollout.tool),
        s.top_p,
        s.top_k,
    )


def training_draw(config: Config, tokenizer: Any) -> Draw:
    """As the sampler of the configuration draws."""
    s, plain = config.sampler, replace(plain_draw(config), repetitions=config.rollout.repetition.count)
    if not _notes_first(config):
        return plain
    return replace(plain, rule=dict(s.rule or reshape.FIXED), insert=insert_token(s.insert, tokenizer))


def evaluation_draw(config: Config) -> Draw:
    """The policy as it is, its exact entropies noted.

    A greedy draw notes nothing; nor does an engine that decodes speculatively, which takes no processors.
    """
    plain = plain_draw(config)
    if plain.temperature == 0 or config.generator.engine.get("speculative_config"):
        return plain
    return replace(plain, rule=reshape.FIXED)


def insert_token(text: str | None, tokenizer: Any) -> int | None:
    """The one token that `sampler.insert` is; PreflightError if the tokenizer has no such token."""
    if text is None:
        return None
    ids = tokenizer.encode(text, add_special_tokens=False)
    if len(ids) != 1 or tokenizer.decode(ids) != text or ids[0] == tokenizer.eos_token_id:
        raise PreflightError(
            f"sampler.insert={text!r} is no single token of this tokenizer but {len(ids)} ({ids[:8]}), or "
            "one that ends a response: give a text that encodes to exactly one, such as "
            f"{tokenizer.decode([tokenizer.encode('?', add_special_tokens=False)[0]])!r}"
        )
    return int(ids[0])


def describe_sampler(config: Config) -> str:
    """The sampler in words, for a run's header."""
    s = config.sampler
    rule = reshape.build_rule(s.rule, config.packages)
    described = f"rule {function_name(rule)}, factor on T: {describe_formula(rule)}"
    return (
        described if s.insert is None else f"{described}; insert {s.insert!r} where unsure, once a response"
    )


def check_sampler(config: Config) -> None:
    """What is wrong with a sampler whatever it is used for."""
    s = config.sampler
    marks_unsure = reshape.build_rule(s.rule, config.packages)(*torch.zeros(2, 0)).unsure is not None
    if s.temperature < 0:
        raise ConfigError(f"sampler.temperature={s.temperature:g} must be at least 0")
    if 0 < s.temperature < MINIMUM:
        raise ConfigError(
            f"sampler.temperature={s.temperature:g}: vLLM draws at {MINIMUM:g} instead, and log-probs and "
            f"entropies would be of another distribution; say {MINIMUM:g} or more (an evaluation may say 0)"
        )
    if s.insert is not None and not marks_unsure:
        raise ConfigError(
            f"sampler.insert={s.insert!r} needs a rule that says where it is unsure: choose "
            "sampler=quadrants, or sampler.insert=null"
        )


def check_training_sampler(config: Config) -> None:
    """ConfigError for a sampler whose log-probs cannot be reported, or cannot be corrected for."""
    s, engine = config.sampler, config.generator.engine
    if s.top_p != 1.0 or s.top_k != 0:
        raise ConfigError(
            "sampler.top_p and sampler.top_k must be 1.0 and 0 in training: the log-probs of a truncated "
            "distribution are not the learner's, so every importance ratio would be wrong"
        )
    if s.temperature <= 0:
        raise ConfigError("sampler.temperature must be above 0 in training: greedy samples carry no gradient")
    if engine.get("logprobs_mode", REPORTED) != REPORTED:
        raise ConfigError(
            f"generator.engine.logprobs_mode={engine['logprobs_mode']}: an engine that does not report the "
            f"log-probs it sampled from cannot be trained on; drop it, {REPORTED} is what is used"
        )
    if not _reshapes(config):
        return
    what, instead = f"generator.engine.logits_processors={own_rule(config)}", "drop them"
    if _has_rule(config):
        what, instead = "this sampler", "choose sampler=fixed"
    if engine.get("speculative_config"):
        raise ConfigError(
            f"{what} reshapes what vLLM draws from, and with speculative decoding vLLM takes no logits "
            f"processors: drop generator.engine.speculative_config, or {instead}"
        )
    if not selection.corrected(config):
        raise ConfigError(
            f"{what} draws from another distribution than the policy's and objective.correction is `none`: "
            f"say 'objective.correction={{fn: truncated_importance}}', or {instead}"
        )
