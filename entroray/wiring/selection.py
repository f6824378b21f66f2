"""`rollout` of the configuration -> how prompts and groups are chosen, and what of it is refused."""

from collections.abc import Mapping
from typing import Any

from entroray.config import RolloutConfig, Second
from entroray.data.curriculum import Curriculum, Rule
from entroray.errors import ConfigError
from entroray.metrics import early_stop
from entroray.metrics.diversity import Loops
from entroray.objective import Objective
from entroray.objective.compatibility import corrects_sampler
from entroray.roles import GroupObserver, Prompts, StepMetrics
from entroray.rollout.replay import Replay
from entroray.rollout.second_draw import MAXIMUM, SecondDraw
from entroray.rollout.selection import Selection


def build_selection(r: RolloutConfig, prompts: Prompts, count: int, seed: int) -> tuple[Prompts, Selection]:
    """The prompts as they come up, `count` an epoch, and what else the run chooses."""
    observers, metrics = dict[str, GroupObserver](), list[StepMetrics]()
    if reorders_prompts(r):
        p, (low, high) = r.prompts, r.prompts.band
        rule = Rule(retire=p.retire, low=low, high=high, outside=p.outside)
        prompts = observers["rollout.prompts"] = curriculum = Curriculum(prompts, count, rule, seed=seed)
        metrics.append(curriculum.metrics)
    if r.early.extra:
        metrics.append(early_stop.abandoned_metrics)
    if r.repetition.count:
        metrics.append(early_stop.repetition_metrics(Loops(r.repetition.count)))
    replay = Replay(r.replay.tokens) if r.replay.tokens else None
    if replay:
        observers["rollout.replay.tokens"] = replay
        metrics.append(replay.metrics)
    second = SecondDraw(r.second.factor, r.second.when, replay)
    if draws_hotter(r.second, "at_once"):
        metrics.append(second.metrics)
    if draws_hotter(r.second, "next_time"):
        observers["rollout.second.when"] = second
    return prompts, Selection(observers, second, metrics)


def draws_hotter(second: Second, when: str) -> bool:
    """Whether a prompt that failed is drawn hotter `when`."""
    return second.factor != 1.0 and second.when == when


def reorders_prompts(r: RolloutConfig) -> bool:
    """Whether any prompt may be passed over."""
    return bool(r.prompts.retire) or list(r.prompts.band) != [0.0, 1.0]


def describe_selection(r: RolloutConfig) -> str:
    """The choices in words, for a run's header."""
    p, words = r.prompts, list[str]()
    if p.retire:
        words.append(f"prompts of pass rate {p.retire:g} and more are passed over")
    if list(p.band) != [0.0, 1.0]:
        words.append(f"prompts outside [{p.band[0]:g}, {p.band[1]:g}] at {p.outside:g} of their turns")
    if draws_hotter(r.second, "at_once"):
        words.append(f"a group all wrong drawn again at once, temperature x {r.second.factor:g}")
    if draws_hotter(r.second, "next_time"):
        words.append(f"failed prompts x {r.second.factor:g} each next time, at most {MAXIMUM:g}")
    if r.early.extra:
        words.append(f"{r.early.extra} more rollouts drawn than taken, the last to finish given up")
    if r.repetition.count:
        words.append(f"stopped after {r.repetition.count} times the same")
    if r.surplus != "by_lag":
        words.append(f"surplus groups: {r.surplus}")
    if r.replay.tokens:
        words.append(f"rare right answers replayed, {r.replay.tokens} tokens kept")
    return "; ".join(words) or "every prompt in its turn, every group as it was drawn"


def check_selection(r: RolloutConfig, max_lag: int) -> None:
    """ConfigError for numbers that choose nothing, or nothing sensible."""
    _check_prompts(r)
    _check_groups(r, max_lag)
    if 0 < r.replay.tokens < r.max_tokens:
        raise ConfigError(
            f"rollout.replay.tokens={r.replay.tokens} has no room for one response of rollout.max_tokens="
            f"{r.max_tokens}: give it more, or 0 for no replay"
        )
    if r.replay.tokens and r.group_size < 2:
        raise ConfigError(
            f"rollout.replay replaces one rollout of a group: rollout.group_size={r.group_size} must be at "
            "least 2, or choose rollout.replay.tokens=0"
        )


def _check_prompts(r: RolloutConfig) -> None:
    p = r.prompts
    if p.outside == 0 and list(p.band) != [0.0, 1.0]:
        raise ConfigError(
            "rollout.prompts.outside=0: a prompt once outside the band would never be looked at again, "
            "however the policy changes; give it a share of its turns, such as 0.1"
        )


def _check_groups(r: RolloutConfig, max_lag: int) -> None:
    if r.repetition.count > r.max_tokens:
        raise ConfigError(
            f"rollout.repetition.count={r.repetition.count} does not fit into rollout.max_tokens="
            f"{r.max_tokens}, so nothing would ever be stopped: lower it"
        )
    if r.surplus == "keep" and max_lag == 0:
        raise ConfigError(
            "rollout.surplus=keep would train in the next step on what the weights of this one sampled, and "
            "driver.max_lag=0 says that all training is on-policy: allow a lag (driver=async), or choose "
            "rollout.surplus=drop"
        )


def check_training_selection(r: RolloutConfig, engine: Mapping[str, Any], objective: Objective) -> None:
    """ConfigError for what is trained on as if the policy had drawn it just now, or cannot be drawn."""
    hotter, corrected = r.second.factor != 1.0, corrects_sampler(objective)
    if hotter and engine.get("speculative_config"):
        raise ConfigError(
            "rollout.second draws hotter in a logits processor, and with speculative decoding vLLM takes "
            "none: drop generator.engine.speculative_config, or choose rollout.second.factor=1"
        )
    if hotter and not corrected:
        raise ConfigError(
            "rollout.second draws at another temperature than the policy's and objective.correction is "
            "`none`: say 'objective.correction={fn: truncated_importance}', as rollout=hotter_again does, or "
            "choose rollout.second.factor=1"
        )
    if r.replay.tokens and not corrected:
        raise ConfigError(
            "rollout.replay trains on answers that older weights drew and objective.correction is `none`: "
            "say 'objective.correction={fn: truncated_importance}', as rollout=replay does, or choose "
            "rollout.replay.tokens=0"
        )
