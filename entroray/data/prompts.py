"""Questions -> prompts -> an endless stream of them."""

import hashlib
import re
import string
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from entroray.data.large import Hashes, first_of_each, mix, release_memory
from entroray.data.large_questions import LargeQuestions
from entroray.data.questions import BadRow, Message, Question
from entroray.data.tables import lookup, message_text
from entroray.errors import ConfigError, DataError, EntrorayError, PreflightError, nearest
from entroray.types import Group, Prompt

# Rendering.


class _Formatter(string.Formatter):
    """str.format, plus `{text:compact}` without white space and `{list:,}` joined by what follows `:`.

    A field is named by its path, as a column is; that of a conversation is its last message.
    """

    def get_field(self, field_name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, str]:
        try:
            return lookup(kwargs, re.sub(r"\[([^]]*)\]", r".\1", field_name)), field_name
        except KeyError:
            raise KeyError(field_name or "{}") from None

    def format_field(self, value: Any, format_spec: str) -> str:
        if isinstance(value, list | tuple):
            if value and all(isinstance(each, Mapping) and "content" in each for each in value):
                return str(message_text(value[-1]))
            return (format_spec or " ").join(map(str, value))
        if format_spec == "compact":
            return "".join(str(value).split())
        return super().format_field(value, format_spec)


def render(question: Question, template: str | None) -> str:
    """`template` filled with the row's fields and those of its metadata; None: the row's own question.

    `"{expression:compact}="` -> `12+34-5=`; `"{numbers}->{target}"` -> `3 5 7->22`, `{numbers:,}` -> `3,5,7`.
    """
    if template is None:
        return question.text
    metadata = question.row.get("metadata")
    fields = {**(metadata if isinstance(metadata, Mapping) else {}), **question.row}
    if not isinstance(fields.get("question"), list | tuple):  # messages, which a template reads by path
        fields["question"] = question.text  # whatever column of that name there is beside the one asked
    try:
        return _Formatter().vformat(template, (), fields)
    except KeyError as error:
        near = nearest(error.args[0], map(str, fields))
        raise ConfigError(
            f"template {template!r}: there is no field {error}; {near}{_braces(template, fields)}"
        ) from error
    except (ValueError, IndexError, AttributeError, TypeError) as error:
        raise ConfigError(
            f"template {template!r} cannot be filled: {error}{_braces(template, fields)}"
        ) from error


def _braces(template: str, fields: Iterable[str]) -> str:
    """How to write the braces of `template` that are text."""
    names = "|".join(map(re.escape, fields))
    doubled = re.sub(
        rf"\{{\{{|\}}\}}|\{{(?:{names})\b[^{{}}]*\}}|[{{}}]",
        lambda m: m[0] if len(m[0]) > 1 else m[0] * 2,
        template,
    )
    return (
        f". A brace that is text is written twice, {{{{ and }}}}: {doubled!r}" if doubled != template else ""
    )


@dataclass(frozen=True)
class PromptSet:
    """Prompts in order of their ids, each once, and how many rows were dropped on the way."""

    prompts: Sequence[Prompt]
    duplicates: int
    too_long: int
    contradictions: int = 0
    """Duplicates with another answer than the one that stayed."""
    differing: frozenset[str] = frozenset()
    """Columns in which a duplicate differs from the row that stayed."""


def prompt_id(task: str, text: str) -> str:
    """16 hex digits of SHA-256 of task and rendered text: the same in every run, on every machine."""
    return hashlib.sha256(f"{task}\0{text}".encode()).hexdigest()[:16]


Tokenize = Callable[[str | Sequence[Message]], tuple[int, ...]]


def make_prompts(
    questions: Sequence[Question],
    *,
    tokenize: Tokenize,
    template: str | None = None,
    max_tokens: int | None = None,
    domain: str = "",
) -> PromptSet:
    """Render, tokenise, drop duplicates (the first stays) and what is longer than `max_tokens`.

    Raises PreflightError when nothing is left or a prompt has no token at all. Of a large table prompts are
    made as they are drawn, see `LargePrompts`.
    """
    if isinstance(questions, LargeQuestions):
        return _large_prompts(questions, tokenize, template, max_tokens, domain)
    found: dict[str, Prompt] = {}
    shortest, too_long, contradictions, differing = float("inf"), set[str](), 0, set[str]()
    for question in questions:
        turns, text = shown(question, template)
        key = prompt_id(question.task, text)
        if first := found.get(key):
            right = {question.answer, *question.alternatives}
            contradictions += right.isdisjoint({first.reference, *first.alternatives})
            differing |= _differing(first.entry, question.row)
        if first or key in too_long:
            continue
        prompt = _make_prompt(question, turns, text, tokenize, domain)
        shortest = min(shortest, len(prompt.token_ids))
        if max_tokens is not None and len(prompt.token_ids) > max_tokens:
            too_long.add(key)
        else:
            found[key] = prompt
    if not found:
        raise _nothing_left(len(questions), shortest, max_tokens)
    prompts = tuple(found[key] for key in sorted(found))
    duplicates = len(questions) - len(found) - len(too_long)
    return PromptSet(prompts, duplicates, len(too_long), contradictions, frozenset(differing))


def shown(question: Question, template: str | None) -> tuple[list[Message], str]:
    """The messages of a prompt, and its text."""
    text = render(question, template)
    turns: list[Message] = [*question.before, {"role": "user", "content": text}]
    return turns, "\n".join(f"{t['role']}: {t['content']}" for t in turns) if question.before else text


def _make_prompt(
    question: Question, turns: list[Message], shown: str, tokenize: Tokenize, domain: str
) -> Prompt:
    tokens = tuple(tokenize(turns if question.before else shown))
    if not tokens:
        raise PreflightError(f"the prompt {shown!r} has no tokens")
    key, right = prompt_id(question.task, shown), question.alternatives
    return Prompt(key, shown, tokens, question.answer, question.row, domain, right)


def _nothing_left(rows: int, shortest: float, max_tokens: int | None) -> PreflightError:
    return PreflightError(
        f"{rows} rows, no prompt: the shortest has {shortest} tokens, raise data.max_prompt={max_tokens}"
    )


def _differing(row: Mapping[str, Any], other: Mapping[str, Any]) -> set[str]:
    """Columns that are not the same in two rows; by what they look like, for arrays compare by element."""
    return {str(name) for name in {*row, *other} if repr(row.get(name)) != repr(other.get(name))}


# Large tables.


@dataclass
class DrawnRows:
    """A large table whose rows become prompts when drawn, and those that did not; kept in the checkpoint."""

    questions: LargeQuestions
    make: Callable[[Question], Prompt]
    max_tokens: int | None
    taken: frozenset[str] = frozenset()
    """Ids and texts that other parts of a mixture have."""
    long: set[int] = field(default_factory=set)
    bad: set[int] = field(default_factory=set)

    def prompt(self, row: int) -> Prompt | None:
        """None for a row that is too long, bad, or another part's; DataError if too many are bad."""
        try:
            prompt = self.make(self.questions[row])
        except (BadRow, ConfigError, PreflightError) as error:
            self.leave_out(row, error, DataError)
            return None
        if self.max_tokens is not None and len(prompt.token_ids) > self.max_tokens:
            self.long.add(row)
            return None
        return None if {prompt.id, prompt.text} & self.taken else prompt

    def leave_out(self, row: int, why: Exception, error: type[EntrorayError]) -> None:
        """Count a bad row, once; raise `error` if they are too many."""
        if row not in self.bad:
            self.bad.add(row)
            self.questions.bad.add(f"{self.questions.place(row)}: {why}")
        self.questions.bad.refuse(error)

    def observe(self, group: Group) -> None:
        """Groups say nothing of rows."""

    def counts(self) -> dict[str, int]:
        """Rows that were no prompt, by why."""
        return {"too_long": len(self.long), "bad": self.questions.bad.count}

    def state(self) -> dict[str, Any]:
        """Plain JSON: the rows by number, for each counts once however often it is met."""
        return {"long": sorted(self.long), "bad": sorted(self.bad), "count": self.questions.bad.count}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.long, self.bad = set(state["long"]), set(state["bad"])
        self.questions.bad.count = state["count"]


class LargePrompts(Sequence[Prompt]):
    """Prompts of some rows of a large table, in order of rows; those that are none are passed over."""

    def __init__(self, drawn: DrawnRows, rows: NDArray[Any], keys: Hashes, domain: str, digest: str):
        self.drawn, self.rows, self.keys = drawn, rows.astype(np.uint32), keys
        self.domain, self.digest = domain, digest
        """Of the questions and answers of all rows."""

    def at(self, index: int) -> Prompt | None:
        """The prompt of the row at `index`; None: it is passed over."""
        return self.drawn.prompt(int(self.rows[index]))

    def __len__(self) -> int:
        """Rows: an upper bound of prompts."""
        return len(self.rows)

    def __iter__(self) -> Iterator[Prompt]:
        return (prompt for index in range(len(self)) if (prompt := self.at(index)))

    def __getitem__(self, index: Any) -> Any:
        return pick(self, index)

    def texts(self) -> Iterator[str]:
        """What each row asks."""
        return self.drawn.questions.texts(self.rows)

    def cut(self, chosen: NDArray[np.bool_]) -> "LargePrompts":
        """The rows that are `chosen`."""
        keys = self.keys[chosen] if len(self.keys) else self.keys
        return LargePrompts(self.drawn, self.rows[chosen], keys, self.domain, self.digest)


def pick(prompts: Sequence[Prompt], index: int | slice) -> Any:
    """As in a list of those that are prompts, by drawing all before them."""
    if isinstance(index, slice):
        return [*islice(prompts, index.start, index.stop, index.step)]
    return next(islice(prompts, index, None))


def _large_prompts(
    questions: LargeQuestions, tokenize: Tokenize, template: str | None, max_tokens: int | None, domain: str
) -> PromptSet:
    """Rows with one question, and one value in each other field of the template, are duplicates."""

    def make(question: Question) -> Prompt:
        return _make_prompt(question, *shown(question, template), tokenize, domain)

    none, shortest = np.empty(0, np.uint64), float("inf")
    kept = replace(questions, asked=none, answers=none, good=none.astype(np.int64))
    drawn = DrawnRows(kept, make, max_tokens)
    for row in questions.good[:PATIENCE].tolist():  # a template that cannot be filled is refused now
        try:
            shortest = min(shortest, len(make(kept[row]).token_ids))
        except BadRow as wrong:
            drawn.leave_out(row, wrong, PreflightError)
        if max_tokens is None or shortest <= max_tokens:
            break
    else:
        raise _nothing_left(len(questions), shortest, max_tokens)
    keys, answers, rows = questions.asked, questions.answers, questions.good
    for name in sorted(template_fields(template) - {"question", questions.question}):
        values = questions.hashes(name)
        values = questions.hashes(f"metadata.{name}") if values is None else values
        keys = keys if values is None else mix(keys ^ values)
    if template:
        keys = mix(keys ^ np.uint64(int(prompt_id("", template), 16)))
    if len(rows) < len(keys):
        keys, answers = keys[rows], answers[rows]
    first, contradictions = first_of_each(keys, answers)
    if len(first) < len(rows):
        rows, keys, answers = rows[first], keys[first], answers[first]
    digest = hashlib.blake2b((mix(keys) ^ answers).data, digest_size=16).hexdigest()
    large = LargePrompts(drawn, rows, keys, domain, digest)
    return PromptSet(large, len(questions) - len(rows), 0, contradictions)


def template_fields(template: str | None) -> set[str]:
    """What a template names, by path."""
    return {
        re.sub(r"\[([^]]*)\]", r".\1", name)
        for _, name, _, _ in string.Formatter().parse(template or "")
        if name
    }


# Parts and order.


@dataclass(frozen=True)
class Split:
    """Three parts without a prompt in common, each in order of ids."""

    heldout: Sequence[Prompt]
    demonstrations: Sequence[Prompt]
    training: Sequence[Prompt]


def split(prompts: Sequence[Prompt], *, heldout: float, demonstrations: float = 0.0) -> Split:
    """Fractions in [0, 1), decided by each id alone: more rows never move a prompt to another part."""
    if min(heldout, demonstrations) < 0 or heldout + demonstrations >= 1:
        raise ConfigError(
            f"data.heldout={heldout} and data.demonstrations={demonstrations} are shares with a sum below 1"
        )
    if isinstance(prompts, LargePrompts):
        places = (prompts.keys >> np.uint64(12)) / 2.0**52
        out, shown = places < heldout, places >= 1 - demonstrations
        prompts.keys = prompts.keys[:0]  # nobody needs them any more
        return Split(*(prompts.cut(rows) for rows in (out, shown & ~out, ~out & ~shown)))
    parts: tuple[list[Prompt], ...] = ([], [], [])
    for prompt in sorted(prompts, key=lambda p: p.id):
        place = int(prompt.id[:13], 16) / 16**13  # 52 bits: exact in a float
        parts[0 if place < heldout else 1 if place >= 1 - demonstrations else 2].append(prompt)
    return Split(*map(tuple, parts))


PATIENCE = 10_000
"""Rows that are passed over one after another until there is no hope of a prompt."""


class PromptStream(Iterator[Prompt]):
    """Prompts for ever, in a new order every epoch; the order depends on `seed` and the set of ids alone.

    `position` counts the prompts given or passed over so far; setting it continues from there, exactly.
    """

    def __init__(self, prompts: Sequence[Prompt], *, seed: int, position: int = 0):
        if not prompts:
            raise PreflightError("no prompts to train on")
        large = isinstance(prompts, LargePrompts)
        self._prompts = prompts if large else sorted(prompts, key=lambda p: p.id)
        self._seed, self.position = seed, position
        self._shuffled: tuple[int, NDArray[np.uint32]] | None = None

    def __next__(self) -> Prompt:
        prompt, self.position = next_prompt(self.at, self.position)
        return prompt

    def at(self, position: int) -> Prompt | None:
        """The prompt at `position`, without moving; None: it is passed over."""
        epoch, index = divmod(position, len(self._prompts))
        large = isinstance(self._prompts, LargePrompts)
        if self._shuffled is None or self._shuffled[0] != epoch:
            self._shuffled = (
                epoch,
                (_large_order if large else _order)(len(self._prompts), self._seed, epoch),
            )
        place = int(self._shuffled[1][index])
        return self._prompts.at(place) if isinstance(self._prompts, LargePrompts) else self._prompts[place]


def next_prompt(at: Callable[[int], Prompt | None], position: int) -> tuple[Prompt, int]:
    """The first prompt from `position` on, and the position behind it; DataError where there is none."""
    for place in range(position, position + PATIENCE):
        if prompt := at(place):
            return prompt, place + 1
    raise DataError(f"{PATIENCE} rows one after another are longer than data.max_prompt, or bad: raise it")


def _order(count: int, seed: int, epoch: int) -> NDArray[np.uint32]:
    """Raw PCG64 words, sorted: NumPy promises those streams for ever, and `permutation` only for now."""
    words = np.random.PCG64([seed, epoch]).random_raw(count)
    return np.argsort(words, kind="stable").astype(np.uint32)


def _large_order(count: int, seed: int, epoch: int) -> NDArray[np.uint32]:
    """The same by the upper half of each word; the lower is the row's number, so that they sort fast."""
    words = np.random.PCG64([seed, epoch]).random_raw(count)
    words >>= np.uint64(32)
    words <<= np.uint64(32)
    words |= np.arange(count, dtype=np.uint64)
    words.sort()
    order = words.astype(np.uint32)
    del words
    release_memory()
    return order
