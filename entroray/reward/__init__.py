"""Verifiers: functions (response text, prompt) -> Verdict, built from `{fn: name, setting: value, ...}`."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from entroray.binding import bind
from entroray.reward import judges, tools
from entroray.reward.parts import judge_parts
from entroray.reward.served import bind_judge, is_served
from entroray.reward.verdicts import Judge, failed, guarded, last_line
from entroray.types import Prompt, Verdict


def build_judge(spec: Mapping[str, Any], packages: Iterable[str] = ()) -> Judge:
    """The judge that `spec` describes, which cannot raise; imports whatever it needs now.

    ConfigError for an unknown name, and for a setting that is unknown, missing or of the wrong type.
    """
    return guarded(bind_judge(spec, packages)(), f"{judges.SETTING} {spec['fn']}")


def build_tool(spec: Mapping[str, Any], packages: Iterable[str] = ()) -> Judge:
    """The tool that `spec` describes, in the shape of a judge; ConfigError as for one.

    Its verdict's `answer` is the tool's, `correct` whether there is one; a tool that raises answers ERROR.
    """
    tool = bind(tools, spec, packages)()

    def answer(call: str, prompt: Prompt) -> Verdict:
        try:
            return Verdict(1.0, True, str(tool(str(call), prompt))[: tools.LONGEST])
        except (Exception, SystemExit) as error:  # boundary: user code; the policy is told and goes on
            return Verdict(0.0, False, tools.ERROR, detail=last_line(error))

    return answer


def build_verification(
    *,
    judges: Mapping[str, Mapping[str, Any]],
    tool: Mapping[str, Any] | None = None,
    packages: Iterable[str] = (),
) -> Callable[..., Verdict]:
    """What a verifier's processes run: the judge of the prompt's domain ("" without domains), and the tool.

    It takes (text, prompt, name of the judge's part); judges on servers are not among them. A `Call` is
    answered by the tool, in the same processes and under the same deadline.
    """
    packages = tuple(packages)
    parts = {(d, name): s for d, judge in judges.items() for name, s in judge_parts(judge).items()}
    built = {
        at: build_judge(s, packages) for at, s in parts.items() if not is_served(bind_judge(s, packages))
    }
    answer = build_tool(tool, packages) if tool else None

    def verify(text: str, prompt: Prompt, part: str = "") -> Verdict:
        if answer and isinstance(text, tools.Call):
            return answer(text, prompt)
        if prompt.domain not in judges:
            return failed(f"no judge of domain {prompt.domain!r}, of {', '.join(judges)} only")
        return built[prompt.domain, part](text, prompt)

    return verify
