"""The metrics that a run with these settings measures, by their exact names: what a controller may read."""

import difflib
from collections.abc import Iterator, Sequence

from entroray.config import Config
from entroray.errors import ConfigError
from entroray.metrics.catalogue import (
    BRANCHES,
    CHOICE,
    DESCRIBED,
    DIAGNOSED,
    DOMAIN,
    HELDOUT,
    LAW,
    PREDICTION,
    PROBE,
    RUN,
    SAMPLER,
    TOOLS,
    UPDATE,
)
from entroray.metrics.metric import Metric, expand_names
from entroray.metrics.pass_at_k import powers_of_two
from entroray.objective import build_objective
from entroray.objective.activity import counted_functions
from entroray.wiring import rollout_plan, sampler, selection, tool

NOT_READ = ("step", "control/<name>")
"""What a line of metrics.jsonl has beside what the step measured."""
PART = "reward/part_"
"""What the parts of verdicts begin with."""
LAW_IS_OFF = "the law is off while anything in `control` acts; read entropy/mean or correct/mean"


def check_signal(config: Config, place: str, signal: str) -> None:
    """ConfigError for a signal that no step will ever have measured, with the setting that would bring it."""
    known = {name: lacks for rows, lacks in _families(config) for name in _names(config, rows, lacks)}
    if signal.startswith(PART):
        # which parts a judge of one's own gives is known only when it has judged
        known[signal] = "" if config.reward.path else "a judge of your own gives verdicts parts (reward.path)"
    if signal not in known:
        near = difflib.get_close_matches(signal, known, n=1)
        guess = f"did you mean `{near[0]}`? " if near else ""
        raise ConfigError(
            f"{place}: no step of these settings measures `{signal}`: {guess}entroray/metrics/README.md "
            "lists every metric"
        )
    if known[signal]:
        raise ConfigError(f"{place}: no step of these settings measures `{signal}`: {known[signal]}")


def _names(config: Config, rows: Sequence[Metric], lacks: str) -> Iterator[str]:
    """Exact names of `rows`; of what is lacking too, so that it is told apart from what is misspelt."""
    samples = config.evaluate.samples if rows is HELDOUT else config.rollout.group_size
    fills = {
        "<n>": [str(k) for k in powers_of_two(samples)],
        "<d>": list(config.data.parts),
        "<rule>": counted_functions(build_objective(config.objective, config.packages)),
    }
    for metric in rows:
        if metric.name not in NOT_READ:
            yield from expand_names(metric, fills)


def _families(config: Config) -> Iterator[tuple[Sequence[Metric], str]]:
    """Metrics, and what to do where these settings do not have them; empty where they do."""
    rollout, observe = config.rollout, config.observe
    for rows in (DESCRIBED, UPDATE, DOMAIN):
        yield rows, ""
    rescored = [m for m in RUN if m.name == "seconds/rescore"]
    yield [m for m in RUN if m not in rescored], ""
    needs: list[tuple[Sequence[Metric], object, str]] = [
        ([*DIAGNOSED, *PROBE], observe.diagnosis.every, "set observe.diagnosis.every above 0"),
        ([*PREDICTION, *rescored], observe.prediction.every, "set observe.prediction.every above 0"),
        (LAW, False, LAW_IS_OFF),
        (HELDOUT, 0 < config.evaluate.every <= config.run.steps, "set evaluate.every within 1..run.steps"),
        (SAMPLER, sampler.notes_entropy(config), "choose a sampler that shapes, such as sampler=by_entropy"),
        (TOOLS, tool.uses_tool(config), "give the rollouts a tool (rollout.tool)"),
        (BRANCHES, rollout_plan.branches(config), "choose a plan that forks (rollout.plan)"),
        (
            _of("prompts/"),
            selection.reorders_prompts(rollout),
            "set rollout.prompts.retire or rollout.prompts.band",
        ),
        (_of("second/"), rollout.second.factor != 1.0, "set rollout.second.factor above 1"),
        (_of("early/"), rollout.early.extra, "set rollout.early.extra above 0"),
        (_of("repetition/"), rollout.repetition.count, "set rollout.repetition.count above 0"),
        (_of("replay/"), rollout.replay.tokens, "set rollout.replay.tokens above 0"),
    ]
    for family, there, lacks in needs:
        yield family, "" if there else lacks


def _of(prefix: str) -> list[Metric]:
    return [m for m in CHOICE if m.name.startswith(prefix)]
