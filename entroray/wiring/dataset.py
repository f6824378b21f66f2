"""Configuration -> tokenizer, prompts in three disjoint parts, and the judge's spec."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

from entroray.binding import bind
from entroray.config import Config, Data, Evaluate, Part, Reward
from entroray.data import mixture, prompts, sources
from entroray.errors import ConfigError, PreflightError
from entroray.evaluation.evaluate import heldout_prompts
from entroray.policy.tokenizer import Chat, chat, load_tokenizer
from entroray.reward import judges
from entroray.reward.user_file import absolute
from entroray.roles import GroupObserver, StepMetrics
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
    for name, part in tasks(config.data, config.model.system).items():
        _bind_source(part, config.packages)
        if spec := part.judge or config.reward.judge:
            place = f"data.parts.{name}.judge" if part.judge else judges.SETTING
            bind(judges, spec, config.packages, place)


def read_questions(part: Part, packages: Sequence[str]) -> tuple[Sequence[sources.Question], int]:
    """All rows of a part's source, and how many bad ones were left out."""
    return _bind_source(part, packages)(part.task)


def _bind_source(
    part: Part, packages: Sequence[str]
) -> Callable[[str], tuple[Sequence[sources.Question], int]]:
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
    if mixture.large_parts(split.training):
        dropped += "; of a large table more show as its rows are drawn (prompts/too_long, prompts/bad)"
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


def prompt_order(d: Data, of: Sequence[Prompt], seed: int) -> prompts.PromptStream | mixture.Mixture:
    """These prompts without end, as a run draws them."""
    return mixture.prompt_stream(of, weights(d), seed=seed)


def judge_spec(config: Config) -> Mapping[str, Any]:
    """What a verifier builds: a user's function if `reward.path` is set, else the tasks' judges; the tool."""
    spec = tool.tool_spec(config.rollout.tool) if tool.uses_tool(config.rollout.tool) else None
    return {"judges": _judges(config), "tool": spec, "packages": config.packages}


def _judges(config: Config) -> Mapping[str, Mapping[str, Any]]:
    """The judge of each part of the mixture; "" is the one task without parts."""
    if config.reward.path:
        path = absolute(config.reward.path)
        return {name: {"fn": "custom", "path": path} for name in tasks(config.data, config.model.system)}
    specs = {
        name: part.judge or config.reward.judge
        for name, part in tasks(config.data, config.model.system).items()
    }
    if not all(specs.values()):
        where = next(f"data.parts.{n}.judge" if n else "reward.judge" for n in specs if not specs[n])
        raise ConfigError(f"no judge: set {where} (as conf/data does), or reward.path=my_file.py:my_function")
    return specs


def describe_tasks(d: Data, shared: str | None, reward: Reward) -> list[str]:
    """How questions are put and judged, in words: a line for each part; `shared` is model.system."""
    lines = []
    for name, part in tasks(d, shared).items():
        system = part.system or shared
        said = f"{part.task}, template {part.template!r}, system {system!r}"
        judged = "" if reward.path else f", judged by {(part.judge or reward.judge).get('fn')}"
        lines.append(f"{name}: weight {part.weight:g}, {said}{judged}" if name else said + judged)
    return lines


def check_heldout(e: Evaluate, parts: Parts, read_in: Dataset) -> None:
    """PreflightError if something reads held-out prompts and there is none."""
    asked = [f"evaluate.every={e.every}"] if e.every else ["evaluate.final=true"] if e.final else []
    read = [c for c in parts.controllers if c.signal == "entropy/prompt_in"]
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
        drawn.restore(drawn.state() | {"too_long": 0})
    counts = lambda *_: {
        f"prompts/{why}": float(sum(drawn.state()[why] for drawn in rows.values()))
        for why in ("too_long", "bad")
    }
    return dict(rows), [counts] if rows else []


def identity(config: Config, read_in: Dataset) -> dict[str, str]:
    """Setting -> a hash of what it names, which may have been replaced where the setting has not changed."""
    rows = "\n".join(_content(read_in.split.training))
    words = repr(sorted(read_in.tokenizer.get_vocab().items()))
    named = {"data.task": rows, "model.path": words, "model.template": str(read_in.tokenizer.chat_template)}
    for setting in ("reward.path", "rollout.tool.path"):
        if path := attrgetter(setting)(config):
            named[setting] = Path(absolute(path).rpartition(":")[0]).read_text(errors="replace")
    hashed = lambda text: hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
    return {setting: hashed(text) for setting, text in named.items()}
