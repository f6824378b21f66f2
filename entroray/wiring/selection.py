"""`rollout` of the configuration -> how prompts and groups are chosen, and what of it is refused."""

from entroray.config import Config, RolloutConfig
from entroray.data.curriculum import Curriculum, Rule
from entroray.errors import ConfigError
from entroray.metrics import early_stop
from entroray.metrics.diversity import Loops
from entroray.objective import build_objective
from entroray.objective.compatibility import corrects_sampler
from entroray.roles import Prompts, StepMetrics
from entroray.rollout.replay import Replay
from entroray.rollout.second_draw import SecondDraw
from entroray.rollout.selection import GroupObserver, Selection


def build_selection(config: Config, prompts: Prompts, count: int) -> tuple[Prompts, Selection]:
    """The prompts as they come up, `count` an epoch, and what else the run chooses."""
    r, memories, tell = config.rollout, dict[str, GroupObserver](), list[StepMetrics]()
    if reorders_prompts(r):
        low, high = r.prompts.band
        p = r.prompts
        rule = Rule(retire=p.retire, low=low, high=high, outside=p.outside)
        prompts = memories["curriculum"] = curriculum = Curriculum(prompts, count, rule, seed=config.seed)
        tell.append(curriculum.metrics)
    if r.early.extra:
        tell.append(early_stop.abandoned_metrics)
    if r.repetition.count:
        tell.append(early_stop.repetition_metrics(loops(r)))
    replay = Replay(r.replay.tokens) if r.replay.tokens else None
    if replay:
        memories["replay"] = replay
        tell.append(replay.metrics)
    rescue = SecondDraw(r.second.factor, replay)
    return prompts, Selection(
        memories, rescue, [*tell, *([rescue.metrics] if r.second.factor != 1.0 else [])]
    )


def loops(r: RolloutConfig) -> Loops:
    """What counts as a response that repeats itself."""
    return Loops(r.repetition.count)


def reorders_prompts(r: RolloutConfig) -> bool:
    """Whether any prompt may be passed over."""
    return bool(r.prompts.retire) or list(r.prompts.band) != [0.0, 1.0]


def describe_selection(r: RolloutConfig) -> str:
    """The choices in words, for a run's header."""
    p, said = r.prompts, list[str]()
    if p.retire:
        said.append(f"prompts of pass rate {p.retire:g} and more are passed over")
    if list(p.band) != [0.0, 1.0]:
        said.append(f"prompts outside [{p.band[0]:g}, {p.band[1]:g}] at {p.outside:g} of their turns")
    if r.second.factor != 1.0:
        said.append(f"a group all wrong drawn again at once, temperature x {r.second.factor:g}")
    if r.early.extra:
        said.append(f"{r.early.extra} more rollouts drawn than taken, the last to finish given up")
    if r.repetition.count:
        said.append(f"stopped after {r.repetition.count} times the same")
    if r.surplus != "by_lag":
        said.append(f"surplus groups: {r.surplus}")
    if r.replay.tokens:
        said.append(f"rare right answers replayed, {r.replay.tokens} tokens kept")
    return "; ".join(said) or "every prompt in its turn, every group as it was drawn"


def check_selection(config: Config) -> None:
    """ConfigError for numbers that choose nothing, or nothing sensible."""
    _check_prompts(config.rollout)
    _check_groups(config.rollout, config.driver.max_lag)
    replay = config.rollout.replay
    if replay.tokens < 0 or (replay.tokens and replay.tokens < config.rollout.max_tokens):
        raise ConfigError(
            f"rollout.replay.tokens={replay.tokens} has no room for one response of rollout.max_tokens="
            f"{config.rollout.max_tokens}: give it more, or 0 for no replay"
        )
    if replay.tokens and config.rollout.group_size < 2:
        raise ConfigError(
            f"rollout.replay puts a success in the place of the only rollout of its group with "
            f"rollout.group_size={config.rollout.group_size}, and nothing that was drawn is left: say 2 or "
            "more, or rollout.replay.tokens=0"
        )


def _check_prompts(r: RolloutConfig) -> None:
    p = r.prompts
    _share("rollout.prompts.retire", p.retire)
    _share("rollout.prompts.outside", p.outside)
    if len(p.band) != 2 or not 0 <= p.band[0] <= p.band[1] <= 1:
        raise ConfigError(
            f"rollout.prompts.band={list(p.band)}: two pass rates, the lower first, both in [0, 1]"
        )
    if p.outside == 0 and list(p.band) != [0.0, 1.0]:
        raise ConfigError(
            "rollout.prompts.outside=0: a prompt once outside the band would never be looked at again, "
            "however the policy changes; give it a share of its turns, such as 0.1"
        )


def _check_groups(r: RolloutConfig, max_lag: int) -> None:
    rep = r.repetition
    if r.second.factor < 1 or r.early.extra < 0:
        raise ConfigError("rollout.second.factor must be at least 1 and rollout.early.extra at least 0")
    if rep.count < 0 or rep.count == 1:
        raise ConfigError(f"rollout.repetition.count={rep.count} must be 0 (off) or at least 2")
    if rep.count > r.max_tokens:
        raise ConfigError(
            f"rollout.repetition.count={rep.count} does not fit into rollout.max_tokens={r.max_tokens}, so "
            "nothing would ever be stopped: lower it"
        )
    if r.surplus == "keep" and max_lag == 0:
        raise ConfigError(
            "rollout.surplus=keep would train in the next step on what the weights of this one sampled, and "
            "driver.max_lag=0 says that all training is on-policy: allow a lag (driver=async), or choose "
            "rollout.surplus=drop"
        )


def _share(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ConfigError(f"{name}={value:g} is a share: between 0 and 1")


def check_training_selection(config: Config) -> None:
    """ConfigError for what is trained on as if the policy had drawn it just now, or cannot be drawn."""
    if config.rollout.second.factor != 1.0 and config.generator.engine.get("speculative_config"):
        raise ConfigError(
            "rollout.second draws hotter in a logits processor, and with speculative decoding vLLM takes "
            "none: drop generator.engine.speculative_config, or choose rollout.second.factor=1"
        )
    if config.rollout.second.factor != 1.0 and not corrected(config):
        raise ConfigError(
            "rollout.second draws at another temperature than the policy's and objective.correction is "
            "`none`: say 'objective.correction={fn: truncated_importance}', as rollout=hotter_again does, or "
            "choose rollout.second.factor=1"
        )
    if config.rollout.replay.tokens and not corrected(config):
        raise ConfigError(
            "rollout.replay trains on answers that older weights drew and objective.correction is `none`: "
            "say 'objective.correction={fn: truncated_importance}', as rollout=replay does, or choose "
            "rollout.replay.tokens=0"
        )


def corrected(config: Config) -> bool:
    """Whether the row weighs what another distribution drew."""
    return corrects_sampler(build_objective(config.objective, config.packages))
