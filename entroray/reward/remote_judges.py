"""Judges on servers, by name: asked by the verifier itself, many at a time, while judge processes judge.

One of your own is an `async def` in one of your `packages`, called with (response, prompt, client), with
settings by keyword; `client.post` is all it needs. It returns a number, a bool or a Verdict.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from entroray.binding import Count, NonNegative, Positive, declare
from entroray.reward.http_client import Client, Unjudged, shown, url_misfit
from entroray.reward.verdicts import CORRECT_FROM, Response, as_verdict
from entroray.types import Prompt, Status, Verdict


def _remote_misfit(*, url: str, **_: object) -> str:
    return url_misfit("url", url)


@declare(misfit=_remote_misfit)
async def remote(
    response: Response,
    prompt: Prompt,
    client: Client,
    *,
    url: str,
    layout: Literal["one", "openrlhf"] = "one",
    key_env: str | None = None,
    timeout: Positive = 60.0,
    deadline: Positive = 300.0,
    concurrency: Count = 32,
) -> Verdict:
    """The verdict of a server of yours: {prompt, response, reference, ...} in, a reward out, both JSON.

    `layout: openrlhf` asks as OpenRLHF does, {query: [...], prompts: [...], labels: [...]}. A try has
    `timeout` seconds, a response with all its tries `deadline`; at most `concurrency` are under way in each
    verifier.
    """
    body = _single(response, prompt) if layout == "one" else _batch(response, prompt)
    answer = await client.post(url, body, key_env=key_env, timeout=timeout)
    return _verdict(answer, shown(url))


def _single(response: Response, prompt: Prompt) -> dict[str, Any]:
    return {
        "prompt": prompt.text,
        "response": response,
        "reference": prompt.reference,
        "alternatives": prompt.alternatives,
        "label": prompt.reference,  # what slime calls it
        "entry": prompt.entry,
        "domain": prompt.domain,
        "tokens": response.tokens,
    }


def _batch(response: Response, prompt: Prompt) -> dict[str, Any]:
    return {"query": [prompt.text + response], "prompts": [prompt.text], "labels": [prompt.reference]}


def _verdict(answer: Any, place: str) -> Verdict:
    """A number, a bool, {reward, correct, parts, answer, detail}, or a list of one of them."""
    found = _only(answer)
    if not isinstance(found, Mapping):
        return as_verdict(found, place)
    name = next((name for name in ("reward", "score", "rewards", "scores") if name in found), "reward")
    reward = _only(found.get(name))
    if not isinstance(reward, bool | int | float):
        shown_answer = json.dumps(answer)[:200]
        raise Unjudged(Status.DATA_FAILED, f"{place} answers without a number as `{name}`: {shown_answer}")
    right = float(reward) >= CORRECT_FROM if found.get("correct") is None else found["correct"]
    parts, detail = found.get("parts") or {}, str(found.get("detail") or "")
    if not isinstance(parts, Mapping) or not all(isinstance(x, bool | int | float) for x in parts.values()):
        shown_parts = json.dumps(parts)[:200]
        raise Unjudged(Status.DATA_FAILED, f"{place} answers with `parts` that are no numbers: {shown_parts}")
    return as_verdict(Verdict(float(reward), right, found.get("answer"), parts, detail=detail), place)


def _only(value: Any) -> Any:
    """What a list of one holds."""
    return value[0] if isinstance(value, list) and len(value) == 1 else value


_FIELD = re.compile(r"\{(question|response|reference|alternatives)\}")
_END = r"(?![A-Za-z0-9_])"
"""Not `\w`: 8分 is 8, and 答案正确 has the word 正确."""
_PLAIN = rf"(?<![A-Za-z0-9_.])(?<!\d[eE][-+])-?(?:\d+(?:\.\d+)?|\.\d+){_END}"
_RANGE = rf"{_PLAIN}\s*(?:-|–|to)\s*\d+(?:\.\d+)?{_END}"
_NUMBER = rf"({_PLAIN})(?:\s*(?:/|out of)\s*(\d+(?:\.\d+)?){_END})?"
_LABELLED = re.compile(
    rf"(?:\b(?:score|rating|grade)\b|分数|评分|得分)(?:{_RANGE}|[^\d\n.-]){{0,20}}(?!{_RANGE}){_NUMBER}",
    re.IGNORECASE,
)
_ANY = re.compile(rf"{_RANGE}|{_NUMBER}")
_TAIL = 20_000
"""Characters of a reply, its last ones, that are looked at."""


def _llm_misfit(
    *, base_url: str, rubric: str, scale: Sequence[float], score: str | None, words: dict | None, **_: object
) -> str:
    if wrong := url_misfit("base_url", base_url):
        return wrong
    if "{response}" not in rubric:
        return f"rubric={rubric[:60]!r} does not show the response: put {{response}} into it"
    if len(scale) != 2 or not scale[0] < scale[1]:
        return f"scale={list(scale)} must be two numbers, the lower first, as in scale: [0, 10]"
    if not all(_in_scale(value, scale) for value in (words or {}).values()):
        return (
            f"words={words} must give each word a number within scale={list(scale)}: {{correct: 1, wrong: 0}}"
        )
    try:
        groups = re.compile(score or "").groups
    except re.error as error:
        return f"score={score!r} is no regular expression: {error}"
    return "" if groups <= 1 else f"score={score!r} must have at most one group: make others (?:...)"


@declare(misfit=_llm_misfit)
async def llm(
    response: Response,
    prompt: Prompt,
    client: Client,
    *,
    base_url: str,
    model: str,
    rubric: str,
    scale: Sequence[float] = (0, 1),
    score: str | None = None,
    words: dict | None = None,
    right_from: float | None = None,
    temperature: NonNegative = 0.0,
    max_tokens: Count = 1024,
    body: dict | None = None,
    key_env: str | None = None,
    timeout: Positive = 120.0,
    deadline: Positive = 300.0,
    concurrency: Count = 32,
) -> Verdict:
    """What a model at an OpenAI-compatible `base_url` says by `rubric`, as a share of `scale`.

    The rubric is a text with {question}, {reference}, {alternatives} and {response}, the last as a JSON
    string, out of which no response can break. Of the reply `words` are read if there are any, else the
    number that `score` captures, else the last one called a score, else the last one within `scale`.
    Right from `right_from` on, by default the upper end. `body` goes into the request; null leaves a key out.
    """
    request = {
        "model": model,
        "messages": [{"role": "user", "content": _filled(rubric, response, prompt)}],
        "temperature": temperature,
        "max_tokens": max_tokens,
        **(body or {}),
    }
    sent = {name: value for name, value in request.items() if value is not None}
    url = base_url.rstrip("/").removesuffix("/chat/completions") + "/chat/completions"
    reply = _reply(await client.post(url, sent, key_env=key_env, timeout=timeout), shown(url))
    value = _score(reply[-_TAIL:], scale, score, words)
    if value is None:
        raise Unjudged(
            Status.DATA_FAILED,
            f"{shown(url)}: no score from {scale[0]:g} to {scale[1]:g} in the reply, "
            f"which ends {reply[-200:]!r}",
        )
    low, high = scale
    right = value >= (high if right_from is None else right_from)
    return Verdict((value - low) / (high - low), right, detail=" ".join(reply[-200:].split()))


def _filled(rubric: str, response: str, prompt: Prompt) -> str:
    """The rubric with its fields filled at once: what stands in a response is no field."""
    fields = {
        "question": prompt.text,
        "reference": prompt.reference,
        "alternatives": ", ".join(prompt.alternatives),
        "response": json.dumps(response, ensure_ascii=False),
    }
    return _FIELD.sub(lambda match: fields[match[1]], rubric)


def _reply(answer: Any, place: str) -> str:
    """What the model said, behind its thinking; Unjudged where it said nothing."""
    try:
        choice = answer["choices"][0]
        said = choice["message"]["content"]
    except (KeyError, IndexError, TypeError):
        shown_answer = json.dumps(answer)[:200]
        raise Unjudged(
            Status.DATA_FAILED, f"{place} answers with no chat completion: {shown_answer}"
        ) from None
    text = said.rpartition("</think>")[2].strip() if isinstance(said, str) else ""
    if not text or text.startswith("<think>"):
        cut = ": raise max_tokens" if choice.get("finish_reason") == "length" else ""
        raise Unjudged(Status.DATA_FAILED, f"{place} answers with an empty reply{cut}")
    return text


def _score(
    reply: str, scale: Sequence[float], pattern: str | None, words: Mapping[str, float] | None
) -> float | None:
    """The number that a reply gives, within `scale`; None if it gives none."""
    if pattern:
        found = list(re.finditer(pattern, reply))
        reply = found[-1][found[-1].re.groups] or "" if found else ""
    if words:
        return _spoken(reply, words)
    return _within(_LABELLED.findall(reply) or _ANY.findall(reply), scale)


def _spoken(reply: str, words: Mapping[str, float]) -> float | None:
    """The number of the last of `words` in a reply, written as it is set, else in another case."""
    longest_first = "|".join(map(re.escape, sorted(words, key=len, reverse=True)))
    values = {word.casefold(): float(value) for word, value in words.items()}
    for flags in (re.NOFLAG, re.IGNORECASE):
        if spoken := re.findall(rf"(?<![A-Za-z0-9_])(?:{longest_first}){_END}", reply, flags):
            return values[spoken[-1].casefold()]
    return None


def _within(found: Sequence[tuple[str, str]], scale: Sequence[float]) -> float | None:
    """The last number within a scale, out of the scale's end if out of anything."""
    fitting = (number for number, of in reversed(found) if number and float(of or scale[1]) == scale[1])
    return next((x for x in map(float, fitting) if _in_scale(x, scale)), None)


def _in_scale(value: object, scale: Sequence[float]) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and scale[0] <= value <= scale[1]  # type: ignore[operator]
