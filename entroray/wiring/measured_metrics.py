"""The metrics that a run with these settings measures, by their exact names: what a controller may read."""

import difflib
from collections.abc import Iterator

from entroray.config import Config
from entroray.errors import ConfigError
from entroray.evaluation.sets import set_label
from entroray.metrics.catalogue import expand_names, family_metrics, read_catalogue
from entroray.metrics.pass_at_k import powers_of_two
from entroray.objective.activity import counted_functions
from entroray.wiring import dataset, sampler, selection, tool
from entroray.wiring.parts import Parts

NOT_MEASURED = ("step", "control/<name>")
"""What a line of metrics.jsonl has beside what the step measured."""
PART = "reward/part_"
"""What the metrics of a verdict's parts begin with."""


def check_signal(config: Config, parts: Parts, place: str, signal: str) -> None:
    """ConfigError for a signal that no step measures, with the setting that would measure it."""
    remedies = _known_signals(config, parts)
    if signal.startswith(PART):
        # the parts of a user's judge, or of a server's, are known only after its first verdict
        name, parts_of = signal.removeprefix(PART), config.reward.parts
        own = f"set reward.parts.{name}, or have a judge of your own give verdicts parts (reward.path)"
        theirs = config.reward.path or (config.reward.judge or {}).get("fn") == "remote"
        theirs = theirs or (name, (config.reward.judge or {}).get("fn")) == ("tests", "code")
        remedies[signal] = "" if theirs or name in parts_of or name.partition(".")[0] in parts_of else own
    if signal not in remedies:
        near = difflib.get_close_matches(signal, remedies, n=1)
        guess = f"did you mean `{near[0]}`? " if near else ""
        raise ConfigError(
            f"{place}: no step of these settings measures `{signal}`: {guess}entroray/metrics/README.md "
            "lists every metric"
        )
    if remedies[signal]:
        raise ConfigError(f"{place}: no step of these settings measures `{signal}`: {remedies[signal]}")


def _known_signals(config: Config, parts: Parts) -> dict[str, str]:
    """Exact name -> the setting that would measure it; empty if these settings do."""
    missing = _missing_families(config, parts)
    fills = {
        "<d>": list(config.data.parts),
        "<rule>": counted_functions(parts.objective),
    }
    remedies: dict[str, str] = {}
    for metric in read_catalogue():
        if metric.family in ("parts", "evaluation", "sets") or metric.name in NOT_MEASURED:
            continue
        samples = config.evaluate.samples if metric.family == "heldout" else config.rollout.group_size
        counts = {"<n>": [str(k) for k in powers_of_two(samples)]}
        remedies |= dict.fromkeys(expand_names(metric, fills | counts), missing.get(metric.family, ""))
    return remedies | dict.fromkeys(_set_metrics(config), missing.get("heldout", ""))


def _set_metrics(config: Config) -> Iterator[str]:
    """What is measured of each evaluation set."""
    for name, of in config.evaluate.sets.items():
        plan, label = dataset.set_plan(config, name, of), set_label(name, config.data.parts)
        for metric in family_metrics("sets"):
            counts = [plan.samples] if "avg@" in metric.name else plan.ks
            yield from expand_names(metric, {"<set>": [label], "<n>": [str(k) for k in counts]})


def _missing_families(config: Config, parts: Parts) -> dict[str, str]:
    """Families of the catalogue that these settings do not measure, with the setting that would."""
    rollout, observe = config.rollout, config.observe
    diagnosed = observe.diagnosis.every, "set observe.diagnosis.every above 0"
    needs: dict[str, tuple[object, str]] = {
        "details": diagnosed,
        "prompt_entropy": diagnosed,
        "prediction": (observe.prediction.every, "set observe.prediction.every above 0"),
        "law": (False, "the law is off while anything in `control` acts; read entropy/mean or correct/mean"),
        "heldout": (0 < config.evaluate.every <= config.run.steps, "set evaluate.every within 1..run.steps"),
        "kept": (sampler.truncates(config.sampler), "set sampler.top_p below 1, or sampler.top_k above 0"),
        "sampler": (
            sampler.notes_entropy(parts, rollout.second),
            "choose a sampler that shapes, such as sampler=by_entropy",
        ),
        "tool": (tool.uses_tool(rollout.tool), "give the rollouts a tool (rollout.tool)"),
        "branching": (parts.branches, "choose a plan that forks (rollout.plan)"),
        "prompts": (
            selection.reorders_prompts(rollout),
            "set rollout.prompts.retire or rollout.prompts.band",
        ),
        "second": (
            selection.draws_hotter(rollout.second, "at_once"),
            "set rollout.second.factor above 1 and rollout.second.when=at_once",
        ),
        "early": (rollout.early.extra, "set rollout.early.extra above 0"),
        "repetition": (rollout.repetition.count, "set rollout.repetition.count above 0"),
        "replay": (rollout.replay.tokens, "set rollout.replay.tokens above 0"),
    }
    return {family: remedy for family, (measured, remedy) in needs.items() if not measured}
