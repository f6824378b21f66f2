"""`sampler` of the configuration -> how the engines are asked to draw, and what of it training refuses."""

from dataclasses import replace
from typing import Any

import torch

from entroray.binding import function_name, holds
from entroray.config import Config
from entroray.errors import ConfigError, PreflightError
from entroray.formula import describe_formula
from entroray.rollout import reshape
from entroray.rollout.heat import Heat
from entroray.wiring import rollout_plan, selection, tool
from entroray.workers.generator import Sampling

REPORTED = "processed_logprobs"
"""vLLM's name for log-probs of the distribution really sampled from."""


LEAST = 0.01
"""Lowest temperature above 0: vLLM draws at this one where a lower is asked, and would not say so."""


def reshapes(config: Config) -> bool:
    """Whether anything but the policy's own distribution may be drawn from."""
    return bool(_reshapes(config) or own_rule(config))


def own_rule(config: Config) -> list[Any]:
    """The user's logits processors; nobody knows what they make of a distribution."""
    return list(config.generator.engine.get("logits_processors") or ())


def _reshapes(config: Config) -> bool:
    """Whether the sampler changes the distribution that tokens are drawn from."""
    return _reshapes_by_rule(config) or config.sampler.failed.factor != 1.0


def _reshapes_by_rule(config: Config) -> bool:
    return not holds(reshape.build_rule(config.sampler.rule, config.packages), "neutral")


def notes_entropy(config: Config) -> bool:
    """Whether the engines need the logits processor that notes and shapes."""
    return _ruled(config) or config.rollout.second.factor != 1.0


def _ruled(config: Config) -> bool:
    """Whether first draws are under a rule, if only one that notes and changes nothing."""
    return _reshapes(config) or rollout_plan.reads_entropy(config)


def plain_sampling(config: Config, temperature: float) -> Sampling:
    """The policy's own distribution at `temperature`; 0 is greedy."""
    s = config.sampler
    return Sampling(temperature, config.rollout.max_tokens, tool.stop_strings(config), s.top_p, s.top_k)


def training_sampling(config: Config, temperature: float, tokenizer: Any) -> Sampling:
    """As the sampler of the configuration draws; a greedy draw is never shaped."""
    s, base = config.sampler, plain_sampling(config, temperature)
    if config.rollout.repetition.count:
        base = replace(base, loops=selection.loops(config.rollout))
    if temperature == 0 or not _ruled(config):
        return base
    put = insert_token(s.insert, tokenizer)
    return base.under(dict(s.rule or reshape.FIXED), insert=put, inserts=s.inserts)


def measuring_sampling(config: Config, temperature: float, tokenizer: Any) -> Sampling:
    """As an evaluation draws: the engine notes exact entropies, and shapes only where evaluate.shaped asks.

    A greedy draw notes nothing; nor does an engine that decodes speculatively, which takes no processors.
    """
    if temperature == 0 or config.generator.engine.get("speculative_config"):
        return plain_sampling(config, temperature)
    drawn = (
        training_sampling(config, temperature, tokenizer)
        if config.evaluate.shaped
        else plain_sampling(config, temperature)
    )
    return drawn if drawn.rule else drawn.under(reshape.FIXED)


def measures_entropy(config: Config) -> str:
    """How an evaluation draws, in words: it heats no prompt, whatever failed in training."""
    greedy_or_plain = config.sampler.temperature == 0 or config.generator.engine.get("speculative_config")
    fixed = not _reshapes_by_rule(config)
    return "fixed" if fixed or greedy_or_plain or not config.evaluate.shaped else _describe_rule(config)


def heat(config: Config) -> Heat:
    """What becomes of prompts that failed."""
    return Heat(config.sampler.failed.factor, config.sampler.failed.most)


def insert_token(text: str | None, tokenizer: Any) -> int | None:
    """The one token that `sampler.insert` is; PreflightError when the tokenizer has no such token."""
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
    failed = config.sampler.failed
    if failed.factor == 1.0:
        return _describe_rule(config)
    return f"{_describe_rule(config)}; failed prompts x {failed.factor:g} each time, at most {failed.most:g}"


def _describe_rule(config: Config) -> str:
    s = config.sampler
    rule = reshape.build_rule(s.rule, config.packages)
    described = f"rule {function_name(rule)}, factor on T: {describe_formula(rule)}"
    if s.insert is None:
        return described
    return f"{described}; insert {s.insert!r} where unsure, at most {s.inserts} a response"


def check_sampler(config: Config) -> None:
    """What is wrong with a sampler whatever it is used for."""
    s = config.sampler
    marks_unsure = reshape.build_rule(s.rule, config.packages)(*torch.zeros(2, 0)).unsure is not None
    if s.temperature < 0:
        raise ConfigError(f"sampler.temperature={s.temperature:g} must be at least 0")
    if 0 < s.temperature < LEAST:
        raise ConfigError(
            f"sampler.temperature={s.temperature:g}: vLLM draws at {LEAST:g} instead, and log-probs and "
            f"entropies would be of another distribution; say {LEAST:g} or more (an evaluation may say 0)"
        )
    if s.failed.factor <= 0 or s.failed.most < 1:
        raise ConfigError("sampler.failed.factor must be above 0 and sampler.failed.most at least 1")
    if s.inserts < 1 or (s.insert is not None and not marks_unsure):
        raise ConfigError(
            f"sampler.insert={s.insert!r} needs a rule that says where it is unsure (sampler=quadrants), and "
            f"sampler.inserts={s.inserts} must be at least 1; with sampler.insert=null nothing is inserted"
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
    if not reshapes(config):
        return
    what, instead = _shaper(config)
    if engine.get("speculative_config"):
        raise ConfigError(
            f"{what} shapes what vLLM draws, and with speculative decoding vLLM takes no logits processors: "
            f"drop generator.engine.speculative_config, or {instead}"
        )
    if not selection.corrected(config):
        raise ConfigError(
            f"{what} draws from another distribution than the policy's and objective.correction is `none`: "
            f"say 'objective.correction={{fn: truncated_importance}}', or {instead}"
        )


def _shaper(config: Config) -> tuple[str, str]:
    """What shapes, and how to do without it, for an error."""
    if _reshapes(config):
        return "this sampler", "choose sampler=fixed"
    return f"generator.engine.logits_processors={own_rule(config)}", "drop them"
