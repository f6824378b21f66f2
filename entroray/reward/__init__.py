"""Verifiers: plain functions (response text, prompt) -> Verdict, chosen by name."""

from collections.abc import Callable, Mapping
from typing import Any

from entroray.reward import choice, custom, gym, math, tools
from entroray.reward.verdicts import Judge, failed, guarded
from entroray.types import Prompt, Verdict


def build_judge(spec: Mapping[str, Any]) -> Judge:
    """The judge that `spec` ({fn: name, setting: value, ...}) describes; imports whatever it needs now.

    Raises ConfigError for an unknown name, an unknown or missing setting, or one of the wrong type.
    """
    return guarded(choice.build_choice(spec, _CHOICES, "reward"), f"reward.{spec['fn']}")


def by_domain(*, judges: dict) -> Judge:
    """The judge of the part of the mixture that the prompt is of."""
    built = {name: build_judge(spec) for name, spec in judges.items()}

    def judge(response: str, prompt: Prompt) -> Verdict:
        if prompt.domain not in built:
            return failed(f"no judge of domain {prompt.domain!r}, of {', '.join(built)} only")
        return built[prompt.domain](response, prompt)

    return judge


def judge_with_tool(*, judge: dict, tool: dict) -> Judge:
    """`judge`, and for what is a `Call` the tool: both in the same processes, under the same deadline."""
    judged, answered = build_judge(judge), tools.build_tool(tool)
    return lambda text, prompt: (answered if isinstance(text, tools.Call) else judged)(text, prompt)


_CHOICES: Mapping[str, Callable[..., Judge]] = {
    "math": math.judge,
    "gym": gym.judge,
    "custom": custom.judge,
    "by_domain": by_domain,
    "with_tool": judge_with_tool,
}
