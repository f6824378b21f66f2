"""Configuration -> tokenizer, prompts in three disjoint parts, and the judge's spec."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from entroray.binding import bind
from entroray.config import Config, Data, Evaluate, Part, Reward, judge_specs, user_files
from entroray.data import mixture, prompts, sources
from entroray.errors import ConfigError, PreflightError
from entroray.evaluation.evaluate import heldout_prompts
from entroray.policy.tokenizer import Chat, chat, load_tokenizer
from entroray.reward.parts import (
    PLACE,
    check_parts,
    describe_judge,
    parts_judge,
    unweighted,
    written_judge,
)
from entroray.reward.served import bind_judge
from entroray.reward.user_file import absolute
from entroray.types import Prompt
from entroray.wiring import tool
from entroray.wiring.parts import Parts


@dataclass(frozen=True)
class Dataset:
    """What a run reads: the tokenizer of its model, prompts by part, how answers are judged."""

    tokenizer: Any
    split: prompts.Split
    judge: Mapping[str, Any]
    dropped: str
    """What was left out, in words."""


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
        if not name or set(name) & set(":/|` "):
            raise ConfigError(f"data.parts: {name!r} is no name for a metric; use letters, digits, _ - .")


def check_tasks(config: Config) -> None:
    """ConfigError for a source or a judge that there is not, or whose settings are wrong."""
    _check_reward(config)
    for part in tasks(config.data, config.model.system).values():
        _bind_source(part, config.packages)
    for place, spec in judge_specs(config):
        judge = unweighted(spec) if place.startswith(PLACE) else spec
        if judge:
            bind_judge(written_judge(judge, place), config.packages, place)


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
    if r.parts and own and len(own) == len(config.data.parts):
        raise ConfigError(
            "reward.parts judges nothing, for each part of the mixture has a judge of its own, which goes "
            f"first: say 'data.parts.{own[0]}.judge={{}}' for each that reward.parts is to judge"
        )


def read_questions(part: Part, packages: Sequence[str]) -> tuple[list[sources.Question], int]:
    """All rows of a part's source, and how many bad ones were left out."""
    return _bind_source(part, packages)(part.task)


def _bind_source(part: Part, packages: Sequence[str]) -> Callable[[str], tuple[list[sources.Question], int]]:
    return bind(sources, {**part.settings, "fn": part.source}, packages)


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
    dropped = f"{duplicates} duplicates{_contradictions(made)}, {too_long} too long, {sum(bad)} bad rows"
    return Dataset(tokenizer, split, judge_spec(config), dropped)


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


def prompt_order(d: Data, of: tuple[Prompt, ...], seed: int) -> prompts.PromptStream | mixture.Mixture:
    """These prompts without end, as a run draws them."""
    return mixture.prompt_stream(of, weights(d), seed=seed)


def judge_spec(config: Config) -> Mapping[str, Any]:
    """What a verifier builds: a user's function if `reward.path` is set, else the tasks' judges; the tool."""
    spec = tool.tool_spec(config.rollout.tool) if tool.uses_tool(config.rollout.tool) else None
    return {"judges": _judges(config), "tool": spec, "packages": config.packages}


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


def check_heldout(e: Evaluate, parts: Parts, read_in: Dataset) -> None:
    """PreflightError if something reads held-out prompts and there is none."""
    asked = [f"evaluate.every={e.every}"] if e.every else ["evaluate.final=true"] if e.final else []
    read = [c for c in parts.controllers if c.signal == "entropy/prompt_in"]
    asked += [f"control.{c.name}.signal={c.signal}" for c in read]
    for asker in asked:
        heldout_prompts(read_in.split.heldout, 1, asker)


def identity(config: Config, read_in: Dataset) -> dict[str, str]:
    """Setting -> a hash of what it names, which may have been replaced where the setting has not changed."""
    rows = "\n".join(f"{prompt.id}\t{prompt.reference}" for prompt in read_in.split.training)
    words = repr(sorted(read_in.tokenizer.get_vocab().items()))
    named = {"data.task": rows, "model.path": words, "model.template": str(read_in.tokenizer.chat_template)}
    for setting, path in user_files(config).items():
        if setting not in named:
            named[setting] = Path(absolute(path).rpartition(":")[0]).read_text(errors="replace")
    hashed = lambda text: hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
    return {setting: hashed(text) for setting, text in named.items()}
