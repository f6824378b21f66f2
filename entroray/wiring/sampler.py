"""`sampler` of the configuration -> how the engines draw, and what of it training refuses."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from entroray.binding import function_name, traits
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
MOST_KEPT = 1024
"""Largest top_k whose sets vLLM is asked for on a GPU: it holds a list of ids for every token drawn."""


def reshapes(parts: Parts, engine: Mapping[str, Any], second: Second) -> bool:
    """Whether a first draw may be from anything but the policy's own distribution."""
    return parts.reshapes or bool(own_processors(engine)) or selection.draws_hotter(second, "next_time")


def own_processors(engine: Mapping[str, Any]) -> list[Any]:
    """The user's logits processors; nobody knows what they make of a distribution."""
    return list(engine.get("logits_processors") or ())


def notes_entropy(parts: Parts, second: Second) -> bool:
    """Whether the engines need the logits processor that notes and reshapes."""
    return parts.notes_entropy or second.factor != 1.0


def truncates(s: Sampler) -> bool:
    """Whether training draws from a part of the vocabulary, so that each token comes with its set."""
    return s.top_p < 1.0 or s.top_k > 0


def masks(config: Config) -> bool:
    """Whether vLLM tells these sets: on GPUs, beside no logits processor. On CPUs our processor does."""
    return truncates(config.sampler) and config.cluster.gpus_per_generator > 0


def plain_draw(s: Sampler, r: RolloutConfig) -> Draw:
    """The policy's own distribution at `sampler.temperature`; 0 is greedy."""
    return Draw(s.temperature, r.max_tokens, tool.stop_strings(s.stop, r.tool), s.top_p, s.top_k)


def training_draw(s: Sampler, r: RolloutConfig, parts: Parts, tokenizer: Any) -> Draw:
    """As the sampler of the configuration draws."""
    plain = replace(plain_draw(s, r), repetitions=r.repetition.count, kept=truncates(s))
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


def describe_sets(config: Config) -> str:
    """What top-p and top-k do to log-probs, in words; empty where they cut nothing."""
    if not truncates(config.sampler):
        return ""
    s, by = config.sampler, "vLLM's sampling mask" if masks(config) else "our logits processor"
    return (
        f"; top-p {s.top_p:g}, top-k {s.top_k}: log-probs and entropies over each token's set, told by {by}"
    )


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


def check_training_sampler(config: Config, parts: Parts) -> None:
    """ConfigError for a sampler whose log-probs cannot be reported, or cannot be corrected for."""
    s, engine = config.sampler, config.generator.engine
    if s.temperature <= 0:
        raise ConfigError("sampler.temperature must be above 0 in training: greedy samples carry no gradient")
    if s.top_k == 1:
        raise ConfigError(
            "sampler.top_k=1 leaves one token to draw, which carries no gradient: set sampler.top_k=0 in "
            "training, or 2 or more"
        )
    if engine.get("logprobs_mode", REPORTED) != REPORTED:
        raise ConfigError(
            f"generator.engine.logprobs_mode={engine['logprobs_mode']}: an engine that does not report the "
            f"log-probs it sampled from cannot be trained on; drop it, {REPORTED} is what is used"
        )
    own = own_processors(engine)
    if truncates(s):
        _check_sets(config, parts)
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


def _check_sets(config: Config, parts: Parts) -> None:
    """ConfigError where the set that each token is drawn from cannot be told."""
    s, engine = config.sampler, config.generator.engine
    cut = f"sampler.top_p={s.top_p:g} and sampler.top_k={s.top_k} in training"
    whole = "set sampler.top_p=1 and sampler.top_k=0"
    if own := own_processors(engine):
        raise ConfigError(
            f"{cut}: log-probs are over the set that a token is drawn from, and generator.engine."
            f"logits_processors={own} may change it unseen: drop them, or {whole}"
        )
    if engine.get("speculative_config"):
        raise ConfigError(
            f"{cut}: with speculative decoding vLLM takes no logits processor, which cuts on CPUs, and its "
            f"sampling masks are untried there: drop generator.engine.speculative_config, or {whole}"
        )
    if not masks(config):
        return
    if not 0 < s.top_k <= MOST_KEPT:
        raise ConfigError(
            f"{cut}: on GPUs vLLM's sampling mask tells what each token is drawn from, and needs sampler."
            f"top_k between 2 and {MOST_KEPT}: set sampler.top_k={MOST_KEPT}"
        )
    if noted := _beside_masks(config, parts):
        raise ConfigError(
            f"{cut}: on GPUs vLLM's sampling mask tells what each token is drawn from, and goes with no "
            f"logits processor and no other draw, but {noted}: change that, or {whole}"
        )


def _beside_masks(config: Config, parts: Parts) -> str:
    """What asks an engine that gives sampling masks for what it cannot do; empty if nothing does."""
    sets = config.evaluate.sets.items()
    greedy = next((name for name, each in sets if set_draw(config, each).temperature == 0), "")
    asked = {
        "sampler.rule reshapes (sampler=fixed does not)": parts.reshapes,
        "rollout.plan reads more of an engine than it draws (rollout=plain does not)": bool(
            traits(parts.plan).needs
        ),
        f"rollout.second.factor={config.rollout.second.factor:g} is not 1": config.rollout.second.factor != 1,
        f"evaluate.sets.{greedy} has temperature 0, and its log-probs would be of one token": bool(greedy),
    }
    return next((what for what, wrong in asked.items() if wrong), "")
