"""Evaluation sets of one's own: how they are read and answered, and what the answers come to."""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from entroray.binding import bind
from entroray.config import EvaluationSet
from entroray.data import sources
from entroray.data.overlap import count_shared, question_hash
from entroray.data.prompts import make_prompts, prompt_id, render, shown
from entroray.errors import ConfigError, PreflightError
from entroray.evaluation import summary
from entroray.evaluation.cot_decoding import Words
from entroray.evaluation.evaluate import EvaluationPlan, sample_answers
from entroray.policy.tokenizer import Chat
from entroray.roles import Generator, Verifier
from entroray.types import Prompt

SETS = "evaluate.sets"


def set_domain(name: str) -> str:
    """What prompts of a set have as their domain: no part of a mixture can be called so."""
    return f"{SETS}:{name}"


def set_label(name: str, parts: Mapping[str, Any]) -> str:
    """What a set's metrics end in: its name, unless a part of the training data has that name, too."""
    return f"sets.{name}" if name in parts else name


@dataclass(frozen=True)
class EvaluatedSet:
    """A set as it was read."""

    task: str
    prompts: tuple[Prompt, ...]
    plan: EvaluationPlan
    label: str
    """What its metrics end in."""
    questions: tuple[frozenset[int], ...]
    """Hashes of what each prompt asks, bare and in the template (data/overlap.py)."""
    left_out: str
    """What is not among the prompts, and why; empty where all of it is."""


# Reading.


def bind_set(
    name: str, of: EvaluationSet, packages: Iterable[str]
) -> Callable[[str], tuple[list[sources.Question], int]]:
    """The source of a set; ConfigError where there is none, or no task."""
    if not of.task:
        raise ConfigError(f"{SETS}.{name}.task is empty: give a file, or the name of a data set of the hub")
    return bind(sources, {**of.settings, "fn": of.source}, packages, f"{SETS}.{name}.source")


def read_set(
    name: str,
    of: EvaluationSet,
    plan: EvaluationPlan,
    label: str,
    packages: Iterable[str],
    tokenize: Chat,
    max_prompt: int,
) -> EvaluatedSet:
    """A set as it is asked, in order of its prompts' ids, which a copy of it at another place has, too.

    ConfigError or PreflightError, by the set's own settings, for one that cannot be read.
    """
    try:
        rows, bad = bind_set(name, of, packages)(of.task)
        made = make_prompts(
            [replace(row, task=name) for row in rows],
            tokenize=tokenize,
            template=of.template,
            max_tokens=max_prompt,
            domain=set_domain(name),
        )
    except (ConfigError, PreflightError) as error:
        own = re.sub(r"\bdata\.(?=task|settings|source|template)", f"{SETS}.{name}.", str(error))
        raise type(error)(own if own.startswith(SETS) else f"{SETS}.{name}.task={of.task}: {own}") from error
    longer = f"longer than data.max_prompt={max_prompt} tokens"
    counts = {"bad rows": bad, "duplicates": made.duplicates, longer: made.too_long}
    left_out = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
    prompts = tuple(made.prompts[: of.prompts])
    forms: dict[str, set[int]] = {prompt.id: set() for prompt in prompts}
    for row in rows:
        hashes = map(question_hash, {row.text, render(row, of.template)})
        forms.get(prompt_id(name, shown(row, of.template)[1]), set()).update(hashes)
    return EvaluatedSet(of.task, prompts, plan, label, tuple(map(frozenset, forms.values())), left_out)


def describe_sets(sets: Mapping[str, EvaluatedSet], training: Iterable[str]) -> list[str]:
    """A line for each set: how it is answered, and how many of its questions are among `training`."""
    shared = count_shared(training, {name: one.questions for name, one in sets.items()})
    return [f"{name}: {_described(one, shared[name])}" for name, one in sets.items()]


def _described(one: EvaluatedSet, shared: int) -> str:
    draw, n = one.plan.draw, one.plan.samples
    left_out = f"LEFT OUT: {one.left_out}; " if one.left_out else ""
    return (
        f"{one.task}, {len(one.prompts)} prompts x {n} {'sample' if n == 1 else 'samples'}, temperature "
        f"{draw.temperature:g}, top-p {draw.top_p:g}, at most {draw.max_tokens} tokens; {left_out}"
        f"{shared or 'none'} of {len(one.questions)} questions {'is' if shared == 1 else 'are'} in the "
        "training data, too"
    )


# Answering.


async def measure_sets(
    sets: Mapping[str, EvaluatedSet],
    generator: Generator,
    verifier: Verifier,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, float]:
    """Metrics of every set, as `avg@32:aime24`; one set after the other, each of them said in a line."""
    found: dict[str, float] = {}
    for name, one in sets.items():
        groups = await sample_answers(generator, verifier, one.prompts, one.plan.draw, one.plan.samples)
        metrics = summary.followed(groups, one.plan.ks)
        say(f"{name}: {say_metrics(metrics, one.plan.samples)}")
        found |= {f"{metric}:{one.label}": value for metric, value in metrics.items()}
    return found


def say_metrics(found: Mapping[str, float], samples: int) -> str:
    """What `summary.followed` found, in words."""
    mean = f"avg@{samples}"
    said = [f"{mean} {found[mean]:.3f} [{found[f'{mean}_low']:.3f} {found[f'{mean}_high']:.3f}]"]
    curves = (f"{curve}@{samples}" for curve in ("pass", "maj"))
    said += [f"{curve} {found[curve]:.3f}" for curve in curves if curve in found]
    forms = {
        "length/mean": "{:.0f} tokens",
        "length/truncated": "{:.1%} truncated",
        "entropy/mean": "entropy {:.4f} nats",
    }
    said += [form.format(found[name]) for name, form in forms.items() if name in found]
    said += [f"{found['failed']:.0f} FAILED, counted as wrong"] if found["failed"] else []
    return ", ".join(said)


async def examine_sets(
    sets: Mapping[str, EvaluatedSet], generator: Generator, verifier: Verifier, words: Words
) -> dict[str, dict[str, Any]]:
    """Everything `entroray eval` finds of each set, as JSON holds it."""
    found: dict[str, dict[str, Any]] = {}
    for name, one in sets.items():
        draw, n = one.plan.draw, one.plan.samples
        groups = await sample_answers(generator, verifier, one.prompts, draw, n)
        asked = {"task": one.task, "prompts": len(one.prompts), "left_out": one.left_out, "samples": n}
        asked |= {
            setting: getattr(draw, setting) for setting in ("temperature", "top_p", "top_k", "max_tokens")
        }
        found[name] = asked | summary.summarise((), groups, (), one.plan.ks, words)
    return found
