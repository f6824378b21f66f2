"""Judges code by its tests: programs run shut in, and what they gave is compared here, where they are not."""

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from entroray.errors import InfrastructureError
from entroray.reward.code_tests import (
    Other,
    Test,
    Tests,
    Unread,
    as_json,
    decode,
    find_code,
    read_tests,
    same,
    same_output,
)
from entroray.reward.programs import Limits, Outcome, Program, Programs
from entroray.reward.verdicts import failed, graded
from entroray.types import Prompt, Status, Verdict

ABSOLUTE = 1e-3
"""Of the relative tolerance, for numbers near 0."""


@dataclass
class Results:
    """Of one response, test by test: None if passed, else why not."""

    wrong: list[str | None]
    weak: int = 0
    """Tests that were decided where the program is, which could have lied."""
    waited: float = 0.0
    """Seconds that programs were ready and no core was free."""


@dataclass(frozen=True)
class CodeJudge:
    """A judge of code; `deadline` seconds for a response, `timeout` for a test of it."""

    programs: Programs
    column: str | None
    timeout: float
    deadline: float
    memory_mb: int
    tolerance: float
    partial: bool

    def __call__(self, response: str, prompt: Prompt) -> Verdict:
        try:
            tests = read_tests(prompt.entry, self.column)
        except ValueError as error:
            return failed(f"prompt {prompt.id}: {error}")
        source = find_code(response)
        if source is None:
            return replace(graded(False, None, "no code"), parts={"tests": 0.0})
        until = time.monotonic() + self.deadline
        judged = self._by_output if tests.tests[0].kind == "stdin" else self._by_value
        try:
            results = judged(source, tests, until)
        except InfrastructureError as error:
            return failed(str(error), Status.INFRA_FAILED)
        ran = self.deadline - results.waited
        if time.monotonic() >= until and ran < min(self.timeout, self.deadline) / 2:
            return failed(f"no core was free for it within {self.deadline:g} s", Status.TIMEOUT)
        return self._verdict(source, results)

    def _verdict(self, source: str, results: Results) -> Verdict:
        wrong = [f"test {n}: {why}" for n, why in enumerate(results.wrong, 1) if why]
        count = len(results.wrong)
        share = (count - len(wrong)) / count
        weak = f", {results.weak} weak" if results.weak else ""
        said = f"{count - len(wrong)} of {count} tests passed{weak}"
        verdict = graded(not wrong, source, "; ".join([said, *wrong[:3]]))
        return replace(verdict, reward=share if self.partial else verdict.reward, parts={"tests": share})

    def _run(self, program: Program, until: float, count: int = 1) -> Outcome:
        wall = max(0.0, until - time.monotonic())
        return self.programs.run(program, Limits(self.timeout, self.memory_mb, wall=wall, count=count))

    def _by_output(self, source: str, tests: Tests, until: float) -> Results:
        """A process for each test."""
        results = Results([])
        for test in tests.tests:
            if time.monotonic() >= until:
                results.wrong.append(f"not run within {self.deadline:g} s")
                continue
            done = self._run(Program(source, stdin=test.given, prelude=tests.prelude), until)
            results.waited += done.waited
            results.wrong.append(self._output_wrong(test, done))
        return results

    def _output_wrong(self, test: Test, done: Outcome) -> str | None:
        if done.ended or done.given:
            return done.ended or _error(done.given[0])
        right = same_output(done.printed, test.expected, self.tolerance, self.tolerance * ABSOLUTE)
        return None if right else f"printed {_short(done.printed)}, not {_short(test.expected)}"

    def _by_value(self, source: str, tests: Tests, until: float) -> Results:
        """One process for all, as their order may matter."""
        known = self._evaluated(_called(tests, source), until)
        steps = [(test.kind, test.given) for test in known]
        done = self._run(Program(source, steps, prelude=tests.prelude), until, len(steps))
        given = [*done.given, *[{"error": done.ended or "it ended before"}] * len(known)]
        wrong = [
            self._value_wrong(test, each)
            for test, each in zip(known, given, strict=False)
            if test.kind != "do"
        ]
        return Results(wrong, sum(test.kind == "hold" for test in known), done.waited)

    def _evaluated(self, tests: Sequence[Test], until: float) -> list[Test]:
        """What is right and no literal is evaluated in a process without the answer; else a test is weak."""
        asked = [n for n, test in enumerate(tests) if isinstance(test.expected, Unread)]
        if not asked:
            return list(tests)
        steps = {n: ("do", test.given) for n, test in enumerate(tests) if test.kind == "do"}
        steps |= {n: ("value", tests[n].expected.text) for n in asked}
        done = self._run(Program("", [steps[n] for n in sorted(steps)]), until, len(steps))
        found = dict(zip(sorted(steps), done.given, strict=False))
        return [self._with_expected(test, found.get(n)) for n, test in enumerate(tests)]

    @staticmethod
    def _with_expected(test: Test, found: object) -> Test:
        if not isinstance(test.expected, Unread):
            return test
        try:
            value = decode(found["value"])  # type: ignore[index]
        except (ValueError, KeyError, TypeError):
            value = Other("")
        if isinstance(value, Other):
            return Test("hold", f"assert {test.given} == {test.expected.text}")
        return replace(test, expected=value)

    def _value_wrong(self, test: Test, given: object) -> str | None:
        if not isinstance(given, dict) or "error" in given:
            return _error(given)
        if test.kind == "hold":
            return None if given.get("held") is True else "it does not hold"
        relative, absolute = test.tolerance or (self.tolerance, self.tolerance * ABSOLUTE)
        try:
            value = decode(given.get("value"))
            value = as_json(value) if test.compare == "json" else value
            if same(value, test.expected, relative, absolute):
                return None
        except (ValueError, RecursionError) as error:
            return str(error)
        return f"{_short(test.given)} gave {_short(value)}, not {_short(test.expected)}"


def _called(tests: Tests, source: str) -> list[Test]:
    """Tests whose function is found: it may be a method of `class Solution`."""
    if not tests.method:
        return tests.tests
    owner = "Solution()." if re.search(r"^class\s+Solution\b", source, re.M) else ""
    return [replace(test, given=f"{owner}{tests.method}{test.given}") for test in tests.tests]


def _error(given: object) -> str:
    return _short(given.get("error")) if isinstance(given, dict) else "it wrote over its results"


def _short(value: object) -> str:
    try:
        text = value if isinstance(value, str) else repr(value)
    except (ValueError, RecursionError):
        text = f"a {type(value).__name__} too large to show"
    return text if len(text) <= 80 else f"{text[:60]}...{text[-15:]}"
