"""`sampler` of the configuration -> how the engines draw, and what of it training refuses."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from entroray.binding import function_name
from entroray.config import Config, EvaluationSet, RolloutConfig, Sampler, Second
from entroray.errors import ConfigError, PreflightError
from entroray.formula import describe_formula
from entroray.objective.compatibility import corrects_sampler
from entroray.rollout import reshape
from entroray.types import Draw
from entroray.wiring import selection, tool
from entroray.wiring.parts import Parts

REPORTED = "processed_logprobs"
"""vLLM's name for log-probs of the distribution really sampled from."""
MINIMUM = 0.01
"""Lowest temperature above 0: vLLM draws at this one if a lower one is asked for, and does not say so."""


def reshapes(parts: Parts, engine: Mapping[str, Any], second: Second) -> bool:
    """Whether a first draw may be from anything but the policy's own distribution."""
    return parts.reshapes or bool(own_processors(engine)) or selection.draws_hotter(second, "next_time")


def own_processors(engine: Mapping[str, Any]) -> list[Any]:
    """The user's logits processors; nobody knows what they make of a distribution."""
    return list(engine.get("logits_processors") or ())


def notes_entropy(parts: Parts, second: Second) -> bool:
    """Whether the engines need the logits processor that notes and reshapes."""
    return parts.notes_entropy or second.factor != 1.0


def plain_draw(s: Sampler, r: RolloutConfig) -> Draw:
    """The policy's own distribution at `sampler.temperature`; 0 is greedy."""
    return Draw(s.temperature, r.max_tokens, tool.stop_strings(s.stop, r.tool), s.top_p, s.top_k)


def training_draw(s: Sampler, r: RolloutConfig, parts: Parts, tokenizer: Any) -> Draw:
    """As the sampler of the configuration draws."""
    plain = replace(plain_draw(s, r), repetitions=r.repetition.count)
    if not parts.notes_entropy:
        return plain
    return replace(plain, rule=dict(s.rule or reshape.FIXED), insert=insert_token(s.insert, tokenizer))


def evaluation_draw(s: Sampler, r: RolloutConfig, engine: Mapping[str, Any]) -> Draw:
    """The policy as it is, its exact entropies noted.

    A greedy draw notes nothing; nor does an engine that decodes speculatively, which takes no processors.
    """
    plain = plain_draw(s, r)
    if plain.temperature == 0 or engine.get("speculative_config"):
        return plain
    return replace(plain, rule=reshape.FIXED)


def set_draw(config: Config, of: EvaluationSet) -> Draw:
    """As an evaluation set is drawn: what it leaves open is the run's own; entropies are noted."""
    s, r = config.sampler, config.rollout
    own = replace(
        s,
        temperature=s.temperature if of.temperature is None else of.temperature,
        top_p=s.top_p if of.top_p is None else of.top_p,
    )
    limit = r.max_tokens if of.max_tokens is None else of.max_tokens
    return evaluation_draw(own, replace(r, max_tokens=limit), config.generator.engine)


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


def describe_sampler(rule: partial, insert: str | None) -> str:
    """The sampler in words, for a run's header."""
    described = f"rule {function_name(rule)}, factor on T: {describe_formula(rule)}"
    return described if insert is None else f"{described}; insert {insert!r} where unsure, once a response"


def check_temperature(temperature: float, place: str) -> None:
    """ConfigError for a temperature that `place` sets and vLLM would not draw at."""
    if temperature < 0:
        raise ConfigError(f"{place}={temperature:g} must be at least 0")
    if 0 < temperature < MINIMUM:
        raise ConfigError(
            f"{place}={temperature:g}: vLLM draws at {MINIMUM:g} instead, and log-probs and "
            f"entropies would be of another distribution; say {MINIMUM:g} or more (an evaluation may say 0)"
        )


def check_sampler(s: Sampler, rule: partial) -> None:
    """What is wrong with a sampler whatever it is used for."""
    marks_unsure = rule(*torch.zeros(2, 0)).unsure is not None
    check_temperature(s.temperature, "sampler.temperature")
    if "" in s.stop:
        raise ConfigError(f"sampler.stop={s.stop}: every response has an empty string in it; leave it out")
    if s.insert is not None and not marks_unsure:
        raise ConfigError(
            f"sampler.insert={s.insert!r} needs a rule that says where it is unsure: choose "
            "sampler=quadrants, or sampler.insert=null"
        )


def check_training_sampler(s: Sampler, engine: Mapping[str, Any], parts: Parts) -> None:
    """ConfigError for a sampler whose log-probs cannot be reported, or cannot be corrected for."""
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
    own = own_processors(engine)
    if not parts.reshapes and not own:
        return
    what, instead = f"generator.engine.logits_processors={own}", "drop them"
    if parts.reshapes:
        what, instead = "this sampler", "choose sampler=fixed"
    if engine.get("speculative_config"):
        raise ConfigError(
            f"{what} reshapes what vLLM draws from, and with speculative decoding vLLM takes no logits "
            f"processors: drop generator.engine.speculative_config, or {instead}"
        )
    if not corrects_sampler(parts.objective):
        raise ConfigError(
            f"{what} draws from another distribution than the policy's and objective.correction is `none`: "
            f"say 'objective.correction={{fn: truncated_importance}}', or {instead}"
        )
