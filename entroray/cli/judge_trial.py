"""Judge and tool tried before anything starts: what they say of an empty and of a long response."""

import asyncio
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain, islice
from typing import Any

import numpy as np

from entroray.binding import effective_settings
from entroray.config import Config, judge_specs
from entroray.data.demonstrations import find_demonstration
from entroray.errors import DataError, EntrorayError, PreflightError
from entroray.evaluation.sets import EvaluatedSet, set_domain
from entroray.reward.judges import OWN
from entroray.reward.parts import describe_judge, judge_parts, unweighted
from entroray.reward.served import bind_judge, may_be_served
from entroray.types import Prompt, Rollout, Status, Verdict
from entroray.wiring import dataset, tool, warm_start
from entroray.workers.verifier import Verifier

ROWS = 200
"""Rows drawn from a generated task: enough to see that it can be generated."""
LOADING = 120.0
"""Seconds for a file of the user's to be loaded."""
PATIENCE = 5.0
"""Seconds after which a server that is not well is given up."""


def read_few(config: Config) -> dataset.Dataset:
    """The data of a run, of a generated task its first `ROWS`."""
    parts = {name: _fewer_rows(part) for name, part in config.data.parts.items()}
    few = replace(_fewer_rows(config.data), parts=parts)
    return dataset.read_dataset(replace(config, data=few), warm_start.run_tokenizer(config))


class ReadOnce:
    """`read_few` for several checks of one configuration: what it gave or raised, again."""

    def __init__(self) -> None:
        self.outcome: dataset.Dataset | EntrorayError | None = None

    def __call__(self, config: Config) -> dataset.Dataset:
        try:
            self.outcome = self.outcome or read_few(config)
        except EntrorayError as error:
            self.outcome = error
        if isinstance(self.outcome, EntrorayError):
            raise self.outcome
        return self.outcome


def _fewer_rows(of: Any) -> Any:
    """The data, or a part of it, with at most `ROWS` generated questions."""
    if of.source != "reasoning_gym":
        return of
    return replace(of, settings={**of.settings, "size": min(of.settings.get("size", ROWS), ROWS)})


def is_own(read: dataset.Dataset) -> bool:
    """Whether a judge or the tool is a function of the user's, a server, or runs code."""
    specs = [spec for judge in read.judge["judges"].values() for spec in judge_parts(judge).values()]
    return any(
        spec.get("fn") in ("custom", "code") or may_be_served(spec)
        for spec in (*specs, read.judge["tool"] or {})
    )


def try_judges(config: Config, read: dataset.Dataset) -> list[str]:
    """Verdicts of each part's judge on its first prompt, and the tool's answers, a line for each.

    DataError where there is no verdict, or where an answer known to be right is wrong; PreflightError where
    a file is not loaded within `LOADING` seconds; ConfigError where it cannot be.
    """
    with tempfile.TemporaryFile() as printed:
        lines = asyncio.run(_tried(config, read, printed.fileno()))
        printed.seek(0)
        text = printed.read().decode(errors="replace")
    said = f"; together they print {len(text)} characters, as in {text[:40]!r}" if text else ""
    return [*lines[:-1], lines[-1] + said]


async def _tried(config: Config, read: dataset.Dataset, output: int) -> list[str]:
    deadline, memory_mb = config.reward.deadline, config.verifier.memory_mb
    verifier = Verifier(
        read.judge, slots=1, deadline=deadline, memory_mb=memory_mb, output=output, patience=PATIENCE
    )
    try:
        async with asyncio.timeout(LOADING):
            await verifier.warm_up()
        lines = [await _judged(config, read, verifier, prompt) for prompt in _first_prompts(read)]
        for name, one in read.sets.items():
            await _check_references(name, one, read, verifier)
        lines += await _unread(config, read, verifier)
        return lines + ([await _called(config, read, verifier)] if read.judge["tool"] else [])
    except TimeoutError as error:
        used = "; ".join({describe_judge(judge): None for judge in read.judge["judges"].values()})
        place = "reward.path=" if config.reward.path else "reward: "
        raise PreflightError(
            f"{place}{used}: the judge was not ready within {LOADING:g} s: do slow work at its first call, "
            "not while its file is imported"
        ) from error
    finally:
        verifier.close()


def _first_prompts(read: dataset.Dataset) -> Iterator[Prompt]:
    """One of each part; with demonstrations if there are any."""
    of_sets = [each.prompts for each in read.sets.values()]
    for domain in read.judge["judges"]:
        prompts = chain(*of_sets, islice(read.split.demonstrations, ROWS), read.split.training)
        yield from islice((prompt for prompt in prompts if prompt.domain == domain), 1)


async def _judged(config: Config, read: dataset.Dataset, verifier: Verifier, prompt: Prompt) -> str:
    known = _known_answer(config, read, prompt)
    judge = read.judge["judges"][prompt.domain]
    right = _answered(judge, read.judge["packages"], prompt.reference) if known is None else known
    texts = [right, "", _long(config)]
    tokens = [read.tokenizer.encode(text, add_special_tokens=False) for text in texts]
    drawn = [_response(prompt, *each) for each in zip(texts, tokens, strict=True)]
    verdicts = await verifier.judge(prompt, drawn)
    name = describe_judge(judge)
    name = f"{prompt.domain.replace(':', '.')}: {name}" if ":" in prompt.domain else name
    for text, verdict in zip(texts, verdicts, strict=True):
        if not verdict.status.usable:
            raise _no_verdict(config, prompt.domain, name, text, verdict)
    if known is not None and not verdicts[0].correct:
        raise DataError(
            f"the judge finds the right answer {known!r} wrong: make reward.judge and data.demonstration fit"
        )
    right, empty, long = map(_shown, verdicts)
    words = len(texts[2].split())
    return (
        f"{name} gives {right} for {texts[0][:40]!r}, {empty} for an empty response, {long} for {words} words"
    )


def _answered(judge: Mapping[str, Any], packages: Sequence[str], reference: str) -> str:
    """A reference in the form in which its judge looks for an answer."""
    spec = unweighted(judge["parts"][judge["correct"]] if "parts" in judge else judge)
    settings = effective_settings(bind_judge(spec, packages))
    forms = {
        "boxed": "\\boxed{%s}",
        "answer_tag": "<answer>%s</answer>",
        "after": f"{settings.get('marker')} %s",
    }
    return forms.get(settings.get("extract", ""), "%s").replace("%s", reference)


def _setting(config: Config, domain: str) -> str:
    """Where the judge of a domain is set."""
    own = f"{domain.replace(':', '.') if ':' in domain else f'data.parts.{domain}'}.judge"
    places = [place for place, spec in judge_specs(config) if spec]
    shared = "reward.parts" if config.reward.parts else "reward.judge"
    return "reward.path" if config.reward.path else own if own in places else shared


def _no_verdict(
    config: Config, domain: str, name: str, text: str, verdict: Verdict
) -> DataError | PreflightError:
    """That a judge must judge every response; of a server that is not there, that it must be."""
    said = f"{name} gave no verdict on {text[:40]!r}: {verdict.status}: {verdict.detail}"
    if verdict.status is Status.INFRA_FAILED:
        return PreflightError(f"{said}; start what it needs first, or mend its setting")
    late = (
        f"raise reward.deadline={config.reward.deadline:g} (or the judge's own deadline), or make it faster"
    )
    remedy = (
        late if verdict.status is Status.TIMEOUT else f"{_setting(config, domain)} must judge every response"
    )
    return DataError(f"{said}; {remedy}")


def _shown(verdict: Verdict) -> str:
    """The reward, its parts, and of code what its tests said."""
    parts = ", ".join(f"{name} {value:g}" for name, value in verdict.parts.items())
    parts = " ".join(verdict.detail.split())[:160] if [*verdict.parts] == ["tests"] else parts
    return f"{verdict.reward:g}" + (f" ({parts})" if parts else "")


async def _check_references(name: str, one: EvaluatedSet, read: dataset.Dataset, verifier: Verifier) -> None:
    """PreflightError for an evaluation set whose references a judge of ours cannot read."""
    asked = judge_parts(read.judge["judges"][set_domain(name)]).values()
    if any(spec.get("fn") not in OWN for spec in asked):  # may take its time, or cost something
        return
    given = await asyncio.gather(*(verifier.judge(p, [_response(p, "", [])]) for p in one.prompts))
    wrong = [verdict.detail for (verdict,) in given if not verdict.status.usable]
    if wrong:
        raise PreflightError(
            f"evaluate.sets.{name}.task={one.task}: {len(wrong)} of {len(one.prompts)} references cannot be "
            f"judged, first {wrong[0]}. Mend them, or set evaluate.sets.{name}.judge"
        )


async def _unread(config: Config, read: dataset.Dataset, verifier: Verifier) -> list[str]:
    """What of the first training references a judge of ours cannot read; DataError where it ends the run."""
    own = {domain for domain, judge in read.judge["judges"].items() if judge.get("fn") in OWN}
    few = [p for p in islice(read.split.training, ROWS) if p.domain in own] if own else []
    given = await asyncio.gather(*(verifier.judge(p, [_response(p, "", [])]) for p in few))
    wrong = [verdict.detail for (verdict,) in given if not verdict.status.usable]
    if len(wrong) > config.reward.max_failed * len(few):
        raise DataError(
            f"data.settings.answer: {len(wrong)} of the first {len(few)} references cannot be judged, first "
            f"{wrong[0]}. Name the column of the answer, choose another reward.judge.fn, or raise "
            f"reward.max_failed={config.reward.max_failed:g}"
        )
    said = f"{len(wrong)} of the first {len(few)} references cannot be judged, first "
    return [said + wrong[0]] if wrong else []


def _known_answer(config: Config, read: dataset.Dataset, prompt: Prompt) -> str | None:
    """A right answer as a response reads, with what a tool says in it."""
    part = dataset.tasks(config.data, config.model.system).get(prompt.domain)
    if config.reward.path or config.reward.parts or part is None or not part.demonstration:
        return None
    answer = find_demonstration(part.demonstration)(prompt.entry)
    return str(read.tokenizer.decode(tool.encode_answer(config.rollout.tool, read.tokenizer, answer)[0]))


async def _called(config: Config, read: dataset.Dataset, verifier: Verifier) -> str:
    prompt, name = next(_first_prompts(read)), config.rollout.tool.path or config.rollout.tool.fn
    empty, long = await verifier.answer(prompt, ["", _long(config)])
    for answer in (empty, long):
        if not answer.status.usable:
            raise DataError(
                f"{name} (rollout.tool.path) gave no answer: {answer.status}: {answer.detail}; raise "
                f"reward.deadline={config.reward.deadline:g}, or make it faster"
            )
    shown = [f"{a.text[:40]!r}" + (f" ({a.detail[:80]})" if a.failed else "") for a in (empty, long)]
    return f"{name} answers {shown[0]} to an empty call, {shown[1]} to a long one"


def _long(config: Config) -> str:
    return "word " * config.rollout.max_tokens


def _response(prompt: Prompt, text: str, tokens: list[int]) -> Rollout:
    ids = np.array(tokens, dtype=np.int32)
    return Rollout(prompt.id, ids, ids.astype(np.float32), ids, text, 1.0, limit=1)
