"""A reward in several parts: `{parts: {name: {fn: ..., settings, weight}}, correct: name}`, each a judge."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from entroray.config import is_user_file
from entroray.errors import ConfigError, nearest
from entroray.reward.http_client import shown
from entroray.reward.user_file import absolute
from entroray.reward.verdicts import as_verdict, failed
from entroray.types import Status, Verdict

PLACE = "reward.parts"
Spec = Mapping[str, Any]


def written_judge(spec: Spec, place: str) -> Spec:
    """The judge set at `place`, as every process builds it: a file is named from the root."""
    if not is_user_file(spec):
        return spec
    return {**spec, "fn": "custom", "path": absolute(str(spec["path"])), "setting": f"{place}.path"}


def isolated(judge: Spec, isolation: str) -> Spec:
    """The judge with `verifier.isolation` in what of it runs code."""
    if "parts" in judge:
        return {**judge, "parts": {name: isolated(spec, isolation) for name, spec in judge["parts"].items()}}
    return {**judge, "isolation": isolation} if judge.get("fn") == "code" else judge


def parts_judge(parts: Mapping[str, Spec], correct: str | None) -> Spec:
    """The judge that `reward.parts` describes, `correct` being `reward.correct`."""
    written = {name: written_judge(spec, f"{PLACE}.{name}") for name, spec in parts.items()}
    return {"parts": written, "correct": correct or next(iter(parts))}


def judge_parts(judge: Spec) -> Mapping[str, Spec]:
    """The parts of a judge by name, without their weights; of a single judge itself, called ""."""
    if "parts" not in judge:
        return {"": judge}
    return {name: unweighted(spec) for name, spec in judge["parts"].items()}


def unweighted(part: Spec) -> Spec:
    """The judge of a part."""
    return {key: value for key, value in part.items() if key != "weight"}


def check_parts(parts: Mapping[str, Spec], correct: str | None) -> None:
    """ConfigError for parts that make no reward, whatever their judges are."""
    if correct is not None and correct not in parts:
        there = nearest(correct, parts) if parts else f"and there is no {PLACE}: leave it out"
        raise ConfigError(f"reward.correct={correct} must name a part of {PLACE}: {there}")
    if len(parts) > 1 and correct is None:
        raise ConfigError(
            f"{PLACE} has {', '.join(parts)}, and one of them must say whether an answer is right: set "
            f"reward.correct={next(iter(parts))}, or another"
        )
    for name, spec in parts.items():
        if not name or set(name) & set(":/|` "):
            raise ConfigError(f"{PLACE}: {name!r} is no name for a metric; use letters, digits, _ - .")
        if not isinstance(spec, Mapping) or not ("fn" in spec or "path" in spec):
            raise ConfigError(
                f"{PLACE}.{name} must read {{fn: name, setting: value, ..., weight: 1}} or "
                f"{{path: my_file.py:my_function, weight: 1}}, got {spec!r}"
            )
        weight = spec.get("weight", 1.0)
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
            raise ConfigError(f"{PLACE}.{name}.weight={weight!r} must be a number")
    if parts and not any(spec.get("weight", 1.0) for spec in parts.values()):
        raise ConfigError(f"{PLACE}: every weight is 0, so that all rewards are: give one part weight=1")


def sum_parts(judge: Spec, verdicts: Mapping[str, Verdict]) -> Verdict:
    """The verdict of a judge from those of its parts: the weighted sum of their rewards.

    Its answer and whether that is right are of the part `correct`. If one part failed, all of it did.
    """
    if "parts" not in judge:
        return verdicts[""]
    for name, verdict in verdicts.items():
        if not verdict.status.usable:
            return failed(f"{PLACE}.{name}: {verdict.detail}", verdict.status)
    own = verdicts[judge["correct"]]
    reward = sum(judge["parts"][name].get("weight", 1.0) * v.reward for name, v in verdicts.items())
    cut = any(v.status is Status.TRUNCATED for v in verdicts.values())
    return as_verdict(
        Verdict(
            reward,
            own.correct,
            own.answer,
            {key: value for name, v in verdicts.items() for key, value in _values(name, v)},
            Status.TRUNCATED if cut else Status.OK,
            "; ".join(f"{name}: {v.detail}" for name, v in verdicts.items() if v.detail),
        ),
        PLACE,
    )


def _values(name: str, verdict: Verdict) -> Iterable[tuple[str, float]]:
    """The reward of a part, and of what that has as parts of its own."""
    yield name, verdict.reward
    for inner, value in verdict.parts.items():
        yield f"{name}.{inner}", value


def describe_judge(judge: Spec) -> str:
    """A judge in words: `1 x answer (math) + 0.2 x form (format), right by answer`."""
    if "parts" not in judge:
        return _describe(judge)
    weighed = [f"{s.get('weight', 1.0):g} x {name} ({_describe(s)})" for name, s in judge["parts"].items()]
    return f"{' + '.join(weighed)}, right by {judge['correct']}"


def _describe(spec: Spec) -> str:
    if is_user_file(spec):
        return str(spec["path"])
    url = spec.get("url") or spec.get("base_url")
    model = f"{spec['model']} " if "model" in spec else ""
    return f"{spec.get('fn')} {model}at {shown(url)}" if isinstance(url, str) else str(spec.get("fn"))
