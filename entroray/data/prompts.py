"""Questions -> prompts -> an endless stream of them."""

import hashlib
import re
import string
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from entroray.data.sources import Message, Question
from entroray.data.tables import lookup, message_text
from entroray.errors import ConfigError, PreflightError, nearest
from entroray.types import Prompt

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
    fields = {
        "question": question.text,
        **(metadata if isinstance(metadata, Mapping) else {}),
        **question.row,
    }
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

    prompts: tuple[Prompt, ...]
    duplicates: int
    too_long: int
    contradictions: int = 0
    """Duplicates with another answer than the one that stayed."""
    differing: frozenset[str] = frozenset()
    """Columns in which a duplicate differs from the row that stayed."""


def prompt_id(task: str, text: str) -> str:
    """16 hex digits of SHA-256 of task and rendered text: the same in every run, on every machine."""
    return hashlib.sha256(f"{task}\0{text}".encode()).hexdigest()[:16]


def make_prompts(
    questions: Iterable[Question],
    *,
    tokenize: Callable[[str | Sequence[Message]], tuple[int, ...]],
    template: str | None = None,
    max_tokens: int | None = None,
    domain: str = "",
) -> PromptSet:
    """Render, tokenise, drop duplicates (the first stays) and what is longer than `max_tokens`.

    Raises PreflightError when nothing is left or a prompt has no token at all.
    """
    found: dict[str, Prompt] = {}
    shortest, too_long, seen, contradictions, differing = float("inf"), set[str](), 0, 0, set[str]()
    for question in questions:
        seen += 1
        text = render(question, template)
        turns = [*question.before, {"role": "user", "content": text}]
        shown = "\n".join(f"{turn['role']}: {turn['content']}" for turn in turns) if question.before else text
        key = prompt_id(question.task, shown)
        if first := found.get(key):
            contradictions += first.reference != question.answer
            differing |= _differing(first.entry, question.row)
        if first or key in too_long:
            continue
        tokens = tuple(tokenize(turns if question.before else text))
        if not tokens:
            raise PreflightError(f"the prompt {shown!r} has no tokens")
        shortest = min(shortest, len(tokens))
        if max_tokens is not None and len(tokens) > max_tokens:
            too_long.add(key)
        else:
            found[key] = Prompt(key, shown, tokens, question.answer, question.row, domain)
    if not found:
        raise PreflightError(
            f"{seen} rows, no prompt: the shortest has {shortest} tokens, raise data.max_prompt={max_tokens}"
        )
    prompts = tuple(found[key] for key in sorted(found))
    duplicates = seen - len(found) - len(too_long)
    return PromptSet(prompts, duplicates, len(too_long), contradictions, frozenset(differing))


def _differing(row: Mapping[str, Any], other: Mapping[str, Any]) -> set[str]:
    """Columns that are not the same in two rows; by what they look like, for arrays compare by element."""
    return {str(name) for name in {*row, *other} if repr(row.get(name)) != repr(other.get(name))}


# Parts and order.


@dataclass(frozen=True)
class Split:
    """Three parts without a prompt in common, each in order of ids."""

    heldout: tuple[Prompt, ...]
    demonstrations: tuple[Prompt, ...]
    training: tuple[Prompt, ...]


def split(prompts: Iterable[Prompt], *, heldout: float, demonstrations: float = 0.0) -> Split:
    """Fractions in [0, 1), decided by each id alone: more rows never move a prompt to another part."""
    if min(heldout, demonstrations) < 0 or heldout + demonstrations >= 1:
        raise ConfigError(
            f"data.heldout={heldout} and data.demonstrations={demonstrations} are shares with a sum below 1"
        )
    parts: tuple[list[Prompt], ...] = ([], [], [])
    for prompt in sorted(prompts, key=lambda p: p.id):
        place = int(prompt.id[:13], 16) / 16**13  # 52 bits: exact in a float
        parts[0 if place < heldout else 1 if place >= 1 - demonstrations else 2].append(prompt)
    return Split(*map(tuple, parts))


class PromptStream(Iterator[Prompt]):
    """Prompts for ever, in a new order every epoch; the order depends on `seed` and the set of ids alone.

    `position` counts the prompts given so far; setting it continues from there, exactly.
    """

    def __init__(self, prompts: Sequence[Prompt], *, seed: int, position: int = 0):
        if not prompts:
            raise PreflightError("no prompts to train on")
        self._prompts = sorted(prompts, key=lambda p: p.id)
        self._seed, self.position = seed, position
        self._shuffled: tuple[int, list[int]] | None = None

    def __next__(self) -> Prompt:
        prompt = self.at(self.position)
        self.position += 1
        return prompt

    def at(self, position: int) -> Prompt:
        """The prompt at `position`, without moving: for those in flight when a run was stopped."""
        epoch, index = divmod(position, len(self._prompts))
        if self._shuffled is None or self._shuffled[0] != epoch:
            self._shuffled = (epoch, _order(len(self._prompts), self._seed, epoch))
        return self._prompts[self._shuffled[1][index]]


def _order(count: int, seed: int, epoch: int) -> list[int]:
    """Raw PCG64 words, sorted: NumPy promises those streams for ever, and `permutation` only for now."""
    words = np.random.PCG64([seed, epoch]).random_raw(count)
    return np.argsort(words, kind="stable").tolist()
