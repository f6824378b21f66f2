"""Configuration -> tokenizer, prompts in three disjoint parts, and the judge's spec."""

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from entroray.binding import bind
from entroray.config import Config, Data, EvaluationSet, Part, Reward, judge_specs, user_files
from entroray.data import mixture, prompts, sources
from entroray.errors import ConfigError, PreflightError
from entroray.evaluation.evaluate import EvaluationPlan, heldout_prompts, plan_evaluation
from entroray.evaluation.sets import (
    SETS,
    EvaluatedSet,
    bind_set,
    describe_sets,
    read_set,
    set_domain,
    set_label,
)
from entroray.policy.tokenizer import Chat, chat, load_tokenizer
from entroray.reward.parts import (
    PLACE,
    check_parts,
    describe_judge,
    isolated,
    parts_judge,
    unweighted,
    written_judge,
)
from entroray.reward.served import bind_judge
from entroray.reward.user_file import absolute
from entroray.roles import GroupObserver, StepMetrics
from entroray.types import Prompt
from entroray.wiring import sampler, tool
from entroray.wiring.parts import Parts


@dataclass(frozen=True)
class Dataset:
    """What a run reads: the tokenizer of its model, prompts by part, how answers are judged."""

    tokenizer: Any
    split: prompts.Split
    judge: Mapping[str, Any]
    dropped: str
    """What was left out, in words."""
    sets: Mapping[str, EvaluatedSet] = field(default_factory=dict)
    """Of `evaluate.sets`, by name."""


def tasks(d: Data, system: str | None) -> dict[str, Part]:
    """The parts of the mixture by name; of one task alone, itself, called ""."""
    alone = Part(
        source=d.source,
        task=d.task,
        settings=d.settings,
        template=d.template,
        system=system,
        demonstration=d.demonstration,
    )
    return d.parts or {"": alone}


def weights(d: Data) -> dict[str, float]:
    """Of the parts of a mixture; nothing for one task alone."""
    return {name: part.weight for name, part in d.parts.items()}


def check_mixture(d: Data) -> None:
    """ConfigError for a mixture that cannot be drawn from."""
    for name, weight in weights(d).items():
        if weight <= 0:
            raise ConfigError(f"data.parts.{name}.weight={weight:g} must be above 0, or leave the part out")
        _check_name("data.parts", name)


def _check_name(place: str, name: str) -> None:
    """ConfigError for a name that metrics cannot end in."""
    if not re.fullmatch(r"[\w.-]+", name):
        raise ConfigError(f"{place}: {name!r} is no name for a metric; use letters, digits, _ - .")


def check_tasks(config: Config) -> None:
    """ConfigError for a source or a judge that there is not, or whose settings are wrong."""
    _check_reward(config)
    for name, part in tasks(config.data, config.model.system).items():
        place = f"data.parts.{name}" if name else "data"
        _bind_source(part, config.packages, f"{place}.source")
        _check_template(part.template, place)
    for place, spec in judge_specs(config):
        judge = unweighted(spec) if place.startswith(PLACE) else spec
        if judge:
            bind_judge(written_judge(judge, place), config.packages, place)


def _check_template(template: str | None, place: str) -> None:
    """ConfigError for a template that makes one prompt of all rows; one that is broken is refused later."""
    with suppress(ValueError):
        if template is not None and not prompts.template_fields(template):
            raise ConfigError(
                f"{place}.template={template!r} names no field, so that every prompt would be the same: "
                "{question} stands for the question, in single braces"
            )


def _check_reward(config: Config) -> None:
    """ConfigError for parts of a reward that are none, or that something else takes the place of."""
    r = config.reward
    check_parts(r.parts, r.correct)
    if r.parts and (r.path or r.judge):
        other = f"reward.judge={{fn: {(r.judge or {}).get('fn')}, ...}}, as most rows of conf/data set it"
        given, drop = (f"reward.path={r.path}", "path") if r.path else (other, "judge")
        raise ConfigError(
            f"reward.parts and {given}: a reward has parts or one judge. Say reward.{drop}=null, and put "
            "what that judges among the parts if it is to count"
        )
    own = [name for name, part in config.data.parts.items() if part.judge]
    judged = any(not of.judge for of in config.evaluate.sets.values())
    if r.parts and own and len(own) == len(config.data.parts) and not judged:
        raise ConfigError(
            "reward.parts judges nothing, for each part of the mixture has a judge of its own, which goes "
            f"first: say 'data.parts.{own[0]}.judge={{}}' for each that reward.parts is to judge"
        )


def read_questions(part: Part, packages: Sequence[str]) -> tuple[Sequence[sources.Question], int]:
    """All rows of a part's source, and how many bad ones were left out."""
    return _bind_source(part, packages)(part.task)


def _bind_source(
    part: Part, packages: Sequence[str], place: str = sources.SETTING
) -> Callable[[str], tuple[Sequence[sources.Question], int]]:
    return bind(sources, {**part.settings, "fn": part.source}, packages, place)


def load_dataset(config: Config, model: str) -> Dataset:
    """The material of a run with the tokenizer of `model`."""
    return read_dataset(config, load_tokenizer(model, config.model.template))


def read_dataset(config: Config, tokenizer: Any) -> Dataset:
    """Read, render, tokenise and split, part by part; PreflightError when nothing is left to train on.

    What two parts have in common stays in the first. Held-out prompts come by turns, so that the first
    few of them are of every part.
    """
    made, bad = zip(
        *(_made(config, tokenizer, *each) for each in tasks(config.data, config.model.system).items()),
        strict=True,
    )
    parts, shared = mixture.without_shared([m.prompts for m in made])
    data = config.data
    cut = [prompts.split(part, heldout=data.heldout, demonstrations=data.demonstrations) for part in parts]
    joined = [mixture.interleave([getattr(s, name) for s in cut]) for name in SPLITS]
    split = prompts.Split(*joined)
    if not all(s.training for s in cut):
        _refuse_empty(list(tasks(config.data, config.model.system)), made, parts, cut)
    duplicates, too_long = sum(m.duplicates for m in made) + shared, sum(m.too_long for m in made)
    dropped = f"{len(split.demonstrations)} demonstrations, " if split.demonstrations else ""
    dropped += f"{duplicates} duplicates{_contradictions(made)}, {too_long} too long, {sum(bad)} bad rows"
    if mixture.large_parts(split.training):
        dropped += "; of a large table more show as its rows are drawn (prompts/too_long, prompts/bad)"
    return Dataset(tokenizer, split, judge_spec(config), dropped, read_sets(config, tokenizer))


def _refuse_empty(
    names: Sequence[str],
    made: Sequence[prompts.PromptSet],
    parts: Sequence[Sequence[Prompt]],
    cut: Sequence[prompts.Split],
) -> None:
    """PreflightError that names the part of which no training prompt is left, and why."""
    for name, read, part, split in zip(names, made, parts, cut, strict=True):
        whose = f"data.parts.{name}: " if name else ""
        if read.prompts and not part:
            raise PreflightError(f"{whose}all of its {len(read.prompts)} prompts are in an earlier part, too")
        if not split.training:
            raise PreflightError(f"{whose}no training prompt is left of {len(part)}: lower data.heldout")


def _contradictions(made: Sequence[prompts.PromptSet]) -> str:
    """What duplicates differ in, where they do: a template may leave out what tells rows apart."""
    count = sum(m.contradictions for m in made)
    columns = sorted(set[str]().union(*(m.differing for m in made)) - {"metadata"})  # numbers each row
    said = [f"{count} with another answer"] if count else []
    said += [f"they differ in {', '.join(columns[:5])}"] if columns else []
    return f" ({'; '.join(said)})" if said else ""


SPLITS = ("heldout", "demonstrations", "training")


def _made(config: Config, tokenizer: Any, name: str, part: Part) -> tuple[prompts.PromptSet, int]:
    rows, bad = read_questions(part, config.packages)
    return prompts.make_prompts(
        rows,
        tokenize=conversation(config, tokenizer, part),
        template=part.template,
        max_tokens=config.data.max_prompt,
        domain=name,
    ), bad


def conversation(config: Config, tokenizer: Any, part: Part) -> Chat:
    """How a part asks its questions; PreflightError if the chat template does not say all of it."""
    return chat(tokenizer, part.system or config.model.system, config.model.template_args)


PROBE = "The quick brown fox jumps over 13 lazy dogs."
"""What engines and learner both score after a sync."""


def probe_ids(tokenizer: Any) -> tuple[int, ...]:
    """The tokens that engines and learner both score, see `driver.probe`."""
    return tuple(tokenizer.encode(PROBE, add_special_tokens=False))


def prompt_order(d: Data, of: Sequence[Prompt], seed: int) -> prompts.PromptStream | mixture.Mixture:
    """These prompts without end, as a run draws them."""
    return mixture.prompt_stream(of, weights(d), seed=seed)


def judge_spec(config: Config) -> Mapping[str, Any]:
    """What a verifier builds: a user's function if `reward.path` is set, else the tasks' judges; the tool."""
    spec = tool.tool_spec(config.rollout.tool) if tool.uses_tool(config.rollout.tool) else None
    found = {**_judges(config), **_set_judges(config)}
    judged = {domain: isolated(judge, config.verifier.isolation) for domain, judge in found.items()}
    return {"judges": judged, "tool": spec, "packages": config.packages}


def _judges(config: Config) -> Mapping[str, Mapping[str, Any]]:
    """The judge of each part of the mixture; "" is the one task without parts."""
    found = tasks(config.data, config.model.system).items()
    return {
        name: domain_judge(config.reward, part.judge, f"data.parts.{name}.judge" if name else "reward.judge")
        for name, part in found
    }


def domain_judge(r: Reward, own: Mapping[str, Any], place: str) -> Mapping[str, Any]:
    """What judges a domain: `reward.path`, else its `own` judge, set at `place`, else what `reward` says.

    ConfigError if there is none.
    """
    if r.path:
        return written_judge({"path": r.path}, "reward")
    if own:
        return written_judge(own, place)
    if r.parts:
        return parts_judge(r.parts, r.correct)
    if r.judge:
        return written_judge(r.judge, "reward.judge")
    raise ConfigError(
        f"no judge: set {place} (as conf/data does), reward.parts or reward.path=my_file.py:my_function"
    )


# Evaluation sets.


def check_sets(config: Config) -> None:
    """ConfigError for an evaluation set that could not be read, drawn, judged or told from others."""
    for name, of in config.evaluate.sets.items():
        place = f"{SETS}.{name}"
        _check_name(SETS, name)
        if name.startswith("sets."):
            raise ConfigError(f"{place}: what begins with `sets.` is another set's, leave that out")
        bind_set(name, of, config.packages)
        _check_template(of.template, place)
        if of.temperature is not None:
            sampler.check_temperature(of.temperature, f"{place}.temperature")
        set_plan(config, name, of)
    _set_judges(config)


def set_plan(config: Config, name: str, of: EvaluationSet) -> EvaluationPlan:
    """How a set is answered; ConfigError for a k above its samples."""
    samples = config.evaluate.samples if of.samples is None else of.samples
    return plan_evaluation(sampler.set_draw(config, of), samples, of.k, f"{SETS}.{name}")


def _set_judges(config: Config) -> Mapping[str, Mapping[str, Any]]:
    """A set's own judge, else what judges one task alone, by the domain of the set's prompts."""
    found = {}
    for name, of in config.evaluate.sets.items():
        place = f"{SETS}.{name}.judge"
        own = written_judge(of.judge, place) if of.judge else domain_judge(config.reward, {}, place)
        found[set_domain(name)] = own
    return found


def read_sets(config: Config, tokenizer: Any) -> dict[str, EvaluatedSet]:
    """Every evaluation set, read, rendered and tokenised; errors name the set and its setting."""
    read, system, variables = {}, config.model.system, config.model.template_args
    for name, of in config.evaluate.sets.items():
        asked = chat(tokenizer, of.system or system, variables)
        label, plan = set_label(name, config.data.parts), set_plan(config, name, of)
        read[name] = read_set(name, of, plan, label, config.packages, asked, config.data.max_prompt)
    return read


def set_lines(config: Config, read_in: Dataset) -> list[str]:
    """A line for each set: how it is answered, and how much of it the training data has, too."""
    return describe_sets(read_in.sets, _training_questions(config, read_in.split)) if read_in.sets else []


def _training_questions(config: Config, split: prompts.Split) -> Iterator[str]:
    """What every row asks; but for large tables they are read again, as prompts hold no bare question."""
    large = [part for name in SPLITS for part in mixture.large_parts(getattr(split, name))]
    for rows in large:
        yield from rows.texts()
    for name, part in tasks(config.data, config.model.system).items():
        if name not in {rows.domain for rows in large}:
            yield from (question.text for question in read_questions(part, config.packages)[0])


def describe_tasks(d: Data, shared: str | None, reward: Reward) -> list[str]:
    """How questions are put and judged, in words: a line for each part; `shared` is model.system."""
    lines = []
    for name, part in tasks(d, shared).items():
        system = part.system or shared
        said = f"{part.task}, template {part.template!r}, system {system!r}"
        judge = domain_judge(reward, part.judge, f"data.parts.{name}.judge" if name else "reward.judge")
        judged = f", judged by {describe_judge(judge)}"
        lines.append(f"{name}: weight {part.weight:g}, {said}{judged}" if name else said + judged)
    return lines


def check_heldout(config: Config, parts: Parts, read_in: Dataset) -> None:
    """PreflightError if something reads held-out prompts and there is none; where there are sets, they do."""
    e, own = config.evaluate, tuple(f":{each.label}" for each in read_in.sets.values())
    needed = e.every and (config.learner.reset_after or not e.sets)
    asked = [f"evaluate.every={e.every}"] if needed else ["evaluate.final=true"] if e.final else []
    signals = [(c, c.signal or "") for c in parts.controllers]
    read = [
        c for c, s in signals if s == "entropy/prompt_in" or (s.startswith("eval/") and not s.endswith(own))
    ]
    asked += [f"control.{c.name}.signal={c.signal}" for c in read]
    for asker in asked:
        heldout_prompts(read_in.split.heldout, 1, asker)


def _content(training: Sequence[Prompt]) -> Iterator[str]:
    """What makes these prompts these: of a large table a hash, of others each id and its right answers."""
    for part in mixture.parts_of(training):
        if isinstance(part, prompts.LargePrompts):
            yield part.digest
        else:
            yield from ("\t".join([p.id, p.reference, *p.alternatives]) for p in part)


def count_drawn(training: Sequence[Prompt]) -> tuple[dict[str, GroupObserver], list[StepMetrics]]:
    """By the setting of its name, each large table's count of rows that were no prompt; and their metrics."""
    rows = {f"data.parts.{p.domain}" if p.domain else "data": p.drawn for p in mixture.large_parts(training)}
    for drawn in rows.values():  # of an earlier run of a lab
        drawn.restore(drawn.state() | {"long": []})
    counts = lambda *_: {
        f"prompts/{why}": float(sum(drawn.counts()[why] for drawn in rows.values()))
        for why in ("too_long", "bad")
    }
    return dict(rows), [counts] if rows else []


def identity(config: Config, read_in: Dataset) -> dict[str, str]:
    """Setting -> a hash of what it names, which may have been replaced where the setting has not changed."""
    rows = "\n".join(_content(read_in.split.training))
    words = repr(sorted(read_in.tokenizer.get_vocab().items()))
    named = {"data.task": rows, "model.path": words, "model.template": str(read_in.tokenizer.chat_template)}
    for setting, path in user_files(config).items():
        if setting not in named and not setting.startswith(f"{SETS}."):  # sets may change
            named[setting] = Path(absolute(path).rpartition(":")[0]).read_text(errors="replace")
    hashed = lambda text: hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
    return {setting: hashed(text) for setting, text in named.items()}
