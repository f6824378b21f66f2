"""Judges on servers, by name: asked by the verifier itself, many at a time, while judge processes judge.

One of your own is an `async def` in one of your `packages`, called with (response, prompt, client), with
settings by keyword; `client.post` is all it needs. It returns a number, a bool or a Verdict.
"""

import asyncio
import json
import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal

import regex

from entroray.binding import Count, NonNegative, Positive, declare
from entroray.errors import nearest
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
    if right not in (0, 1):
        raise Unjudged(
            Status.DATA_FAILED,
            f"{place} answers with `correct`: {json.dumps(right)[:200]}: send true or false",
        )
    parts, detail = found.get("parts") or {}, str(found.get("detail") or "")
    if not isinstance(parts, Mapping) or not all(isinstance(x, bool | int | float) for x in parts.values()):
        shown_parts = json.dumps(parts)[:200]
        raise Unjudged(Status.DATA_FAILED, f"{place} answers with `parts` that are no numbers: {shown_parts}")
    return as_verdict(Verdict(float(reward), right, found.get("answer"), parts, detail=detail), place)


def _only(value: Any) -> Any:
    """What a list of one holds."""
    return value[0] if isinstance(value, list) and len(value) == 1 else value


FIELDS = ("question", "response", "reference", "alternatives")
"""What a rubric shows, in braces."""
_FIELD = re.compile(r"\{\{(\w+)\}\}|(?<![\w\\}^])\{([A-Za-z_]\w*)\}")
r"""`\boxed{x}`, `\frac{a}{b}` and `x^{n}` are no fields, and `{{x}}` is the text {x}."""
_END = r"(?![A-Za-z0-9_])"
r"""Not `\w`: 8分 is 8, and 答案正确 has the word 正确."""
_PLAIN = rf"(?<![A-Za-z0-9_.])(?<!\d[eE][-+])-?(?:\d+(?:\.\d+)?|\.\d+){_END}"
_RANGE = rf"{_PLAIN}\s*(?:-|–|to)\s*\d+(?:\.\d+)?{_END}"
_NUMBER = rf"({_PLAIN})(?:[\s*_`(]*(?:points?\s*)?(?:/|out of)[\s*_`]*(\d+(?:\.\d+)?){_END})?"
_LABELS = r"\b(?:score|rating|grade)\b|分数|评分|得分"
_STATED = rf"(?:{_LABELS})(?:\s*\([^()\n]*\))?[\s\"'*_`]*[:=：|][\s\"'*_`:=|>\[(]*(?!{_RANGE}){_NUMBER}"
_LAST = r"[^\w-]*(?:(?:so|my|the|final|overall|total|verdict|answer|judgement|最终|总)\b[^\w-]*)*"
"""What a last line may begin with that says nothing but a score."""
_ALONE = re.compile(rf"{_LAST}(?:{_STATED}|{_NUMBER})\W*(?:points?\W*)?", re.IGNORECASE)
_SCORED, _ANY = re.compile(_STATED, re.IGNORECASE), re.compile(rf"{_RANGE}|{_NUMBER}")
_DENIAL = r"(?:\b(?:not|never|neither|nor|cannot|hardly|far from)\b|n['’]t\b)(?:\s*[\w'’]+){0,3}"
_NEGATED = re.compile(rf"(?:{_DENIAL}|[不没未]\w{{0,2}})\W?$", re.IGNORECASE)
_ASKED = re.compile(rf"(?:{_LABELS})[\"'*`]*\s*[:=：]", re.IGNORECASE)
_FORM = "\n\nEnd with a line of its own: `Score: N`, N being a number from {:g} to {:g}."
PATIENCE = 1.0
"""Seconds that a pattern of the user's may take for one reply."""
_TAIL = 20_000
"""Characters of a reply, its last ones, that are looked at."""


def _llm_misfit(
    *, base_url: str, rubric: str, scale: Sequence[float], score: str | None, words: dict | None, **_: object
) -> str:
    if wrong := url_misfit("base_url", base_url):
        return wrong
    shown_fields = [field for _, field in _FIELD.findall(rubric) if field]
    if wrong_field := next((field for field in shown_fields if field not in FIELDS), ""):
        return (
            f"rubric={rubric[:60]!r} has no field {{{wrong_field}}}: {nearest(wrong_field, FIELDS)}; braces "
            "that are text are written twice, {{ and }}"
        )
    if "response" not in shown_fields:
        return f"rubric={rubric[:60]!r} does not show the response: put {{response}} into it"
    if len(scale) != 2 or not scale[0] < scale[1]:
        return f"scale={list(scale)} must be two numbers, the lower first, as in scale: [0, 10]"
    if not all(_in_scale(value, scale) for value in (words or {}).values()):
        return (
            f"words={words} must give each word a number within scale={list(scale)}: {{correct: 1, wrong: 0}}"
        )
    try:
        groups = regex.compile(score or "").groups
    except regex.error as error:
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
    number that `score` captures, else the one called a score, else the only one within `scale`; a last line
    that says nothing else goes first. Several are no verdict. A rubric that asks for no form is given one.
    Right from `right_from` on, by default the upper end. `body` goes into the request; null leaves a key out.
    """
    asked = score or words or "response_format" in (body or {}) or _ASKED.search(rubric)
    form = "" if asked else _FORM.format(*scale)
    request = {
        "model": model,
        "messages": [{"role": "user", "content": _filled(rubric, response, prompt) + form}],
        "temperature": temperature,
        "max_tokens": max_tokens,
        **(body or {}),
    }
    sent = {name: value for name, value in request.items() if value is not None}
    url = base_url.rstrip("/").removesuffix("/chat/completions") + "/chat/completions"
    reply = _reply(await client.post(url, sent, key_env=key_env, timeout=timeout), shown(url))
    found = _scores(await _captured(reply[-_TAIL:], score), scale, words)
    if len(found) != 1:
        what = f"several scores, {' and '.join(f'{x:g}' for x in found)}," if found else "no score"
        last = f"a last line with one of {', '.join(words)}" if words else "a last line `Score: N`"
        raise Unjudged(
            Status.DATA_FAILED,
            f"{shown(url)}: {what} from {scale[0]:g} to {scale[1]:g} in the reply, which ends "
            f"{reply[-200:]!r}: have the rubric ask for {last}, or set `score` to a pattern",
        )
    low, high = scale
    right = found[0] >= (high if right_from is None else right_from)
    return Verdict((found[0] - low) / (high - low), right, detail=" ".join(reply[-200:].split()))


def _filled(rubric: str, response: str, prompt: Prompt) -> str:
    """The rubric with its fields filled at once: what stands in a response is no field."""
    fields = {
        "question": prompt.text,
        "reference": prompt.reference,
        "alternatives": ", ".join(prompt.alternatives),
        "response": json.dumps(response, ensure_ascii=False),
    }
    return _FIELD.sub(lambda match: fields[match[2]] if match[2] else f"{{{match[1]}}}", rubric)


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


async def _captured(reply: str, pattern: str | None) -> str:
    """What the user's pattern captures last, within `PATIENCE`; without a pattern the reply itself."""
    if not pattern:
        return reply
    search = partial(regex.findall, pattern, reply, timeout=PATIENCE, concurrent=True)
    try:
        found = await asyncio.to_thread(search)  # elsewhere other verdicts go on
    except TimeoutError:
        why = f"score={pattern!r} is not through a reply within {PATIENCE:g} s: make it simpler"
        raise Unjudged(Status.DATA_FAILED, why) from None
    return str(found[-1]) if found else ""


def _scores(reply: str, scale: Sequence[float], words: Mapping[str, float] | None) -> list[float]:
    """The numbers within `scale` that a reply may mean, each once: one, unless it says none or several."""
    if words:
        return _spoken(reply, words)
    last = _ALONE.fullmatch(reply.rstrip().rpartition("\n")[2])
    if last and (alone := _within([(last[1] or last[3], last[2] or last[4] or "")], scale)):
        return alone
    return _within(_SCORED.findall(reply) or _ANY.findall(reply), scale)


def _spoken(reply: str, words: Mapping[str, float]) -> list[float]:
    """The numbers of those of `words` in a reply, written as they are set, else in another case.

    Not of one that is denied (`not correct`). One that is all of the last line is meant.
    """
    longest_first = "|".join(map(re.escape, sorted(words, key=len, reverse=True)))
    values = {word.casefold(): float(value) for word, value in words.items()}
    last = re.fullmatch(rf"{_LAST}({longest_first})\W*", reply.rstrip().rpartition("\n")[2], re.IGNORECASE)
    if last:
        return [values[last[1].casefold()]]
    for flags in (re.NOFLAG, re.IGNORECASE):
        spoken = list(re.finditer(rf"(?<![A-Za-z0-9_])(?:{longest_first}){_END}", reply, flags))
        if any(_NEGATED.search(reply[max(0, at.start() - 60) : at.start()]) for at in spoken):
            return []
        if spoken:
            return list(dict.fromkeys(values[at[0].casefold()] for at in spoken))
    return []


def _within(found: Sequence[tuple[str, str]], scale: Sequence[float]) -> list[float]:
    """The numbers within a scale, out of the scale's end if out of anything."""
    fitting = (float(number) for number, of in found if number and float(of or scale[1]) == scale[1])
    return list(dict.fromkeys(x for x in fitting if _in_scale(x, scale)))


def _in_scale(value: object, scale: Sequence[float]) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and scale[0] <= value <= scale[1]  # type: ignore[operator]
