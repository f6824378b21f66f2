"""A row of data -> a question with its right answers, or what is wrong with the row."""

import json
import re
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from entroray.data.tables import find, lookup, message_text, unpack, written
from entroray.data.text_rows import Row, recoded
from entroray.errors import EntrorayError

_WRITTEN = re.compile(r"""\s*\[\s*(?:(?:null|None)\s*,\s*)*\{\s*["'](?:(role|content|from)|\w+)["']\s*:""")
"""How a list begins that was written as a text; one of messages, if its first key is theirs."""
_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant"}
"""Of ShareGPT's form, {from, value}."""
_ALONE = re.compile(r"""\s*\[\s*("(?:[^"\\]|\\["\\/bfnrtu])*")\s*\]\s*""")
"""One answer as a JSON list in a text, as Skywork-OR1 has them: `["7"]`."""
Message = Mapping[str, Any]
"""`{role, content}`, as chat templates take them."""


@dataclass(frozen=True)
class Question:
    """One row of data, checked: a question, its known answer, and the row itself."""

    task: str
    text: str
    """What is asked; of a conversation its last message, the user's."""
    answer: str
    row: Row
    before: tuple[Message, ...] = ()
    """The messages of a conversation before `text`."""
    alternatives: tuple[str, ...] = ()
    """Further right answers, besides `answer`."""


@dataclass
class BadRows:
    """Rows of a table that are left out, and how many may be."""

    task: str
    allowed: float
    """Share of all rows."""
    rows: int = 0
    count: int = 0
    listed: tuple[str, ...] = ()
    """The first 20, each with its place and what is wrong."""

    def add(self, problem: str) -> None:
        """One more."""
        self.count += 1
        if len(self.listed) < 20:
            self.listed += (problem,)

    def refuse(self, error: type[EntrorayError]) -> None:
        """Raise `error` if they are too many."""
        if self.count <= self.allowed * self.rows:
            return
        more = f"\n  and {self.count - len(self.listed)} more" if self.count > len(self.listed) else ""
        listed = "".join(f"\n  {problem}" for problem in self.listed)
        latin = any("not UTF-8 at" in problem for problem in self.listed)
        recode = f" ({recoded(self.task, 'LATIN1')})" if latin else ""
        raise error(
            f"{self.task}: {self.count} of {self.rows} rows are bad{listed}{more}\n"
            f"Mend them{recode}, or let a share of them be left out: data.settings.bad_rows=0.01"
        )


class BadRow(Exception):
    """What is wrong with a row."""


def read_question(task: str, row: Row | str, *, question: str, answer: str | None, marker: str) -> Question:
    """The question of a row; BadRow where it has none, or no answer."""
    if isinstance(row, str):
        raise BadRow(row)
    given = _value(row, question)
    value = _messages(given, question)
    if question in row:
        row = {**row, question: value}  # a template reads messages from here, too
    said = "content" if find(given, "0.from") is None else "value"
    *before, last = _conversation(value, question, said)
    reference, *others = _references(_value(row, answer), answer, marker) if answer else [""]
    return Question(task, last["content"], reference, row, tuple(before), tuple(others))


def _references(value: Any, column: str, marker: str) -> list[str]:
    """The right answers: those of a list, each once, else the one."""
    if isinstance(value, str) and (alone := _ALONE.fullmatch(value)):
        decoded = json.loads(alone[1])
        value = decoded if decoded.isprintable() else alone[1][1:-1]  # "\\frac12" with its escape forgotten
    several = value if isinstance(value, list | tuple) else [value]
    if not several:
        raise BadRow(f"{column!r} is [], which is empty")
    return list(dict.fromkeys(_reference(each, column, marker) for each in several))


def _reference(value: Any, column: str, marker: str) -> str:
    text = written(value)
    if text is None:
        raise BadRow(f"{column!r} is {_shown(value)}, neither a text nor a number, nor a list of them")
    _check_filled(column, text)
    reference = (text.rpartition(marker)[2] if marker else text).strip()
    if not reference:
        raise BadRow(f"{column!r} has nothing behind {marker!r}")
    return reference


def _messages(value: Any, column: str) -> Any:
    """Messages without the nulls among them, also in ShareGPT's form, and where a text holds them."""
    if isinstance(value, str) and (begins := _WRITTEN.match(value)):
        held = unpack(value)
        if held is None and begins[1]:
            raise BadRow(f"{column!r} is {_shown(value)}, messages that are neither JSON nor Python")
        spoken = held and all(m is None or "role" in m or "from" in m for m in held)
        value = held if held and (begins[1] or spoken) else value
    if isinstance(value, Mapping) and {"role", "from"} & value.keys():
        value = [value]
    if isinstance(value, list | tuple) and any(isinstance(message, Mapping) for message in value):
        return [_renamed(message) for message in value if message is not None]
    return value


def _renamed(message: Any) -> Any:
    """ShareGPT's {from, value} as {role, content}."""
    if not isinstance(message, Mapping) or "role" in message or not {"from", "value"} <= message.keys():
        return message
    rest = {name: value for name, value in message.items() if name not in ("from", "value")}
    return {"role": _ROLES.get(str(message["from"]), message["from"]), "content": message["value"], **rest}


def _conversation(value: Any, column: str, said: str) -> list[Message]:
    """The messages that a column holds, the last one the user's; a text is one message."""
    if isinstance(value, str):
        _check_filled(column, value)
        return [{"role": "user", "content": value}]
    if not isinstance(value, list | tuple) or not value or not all(isinstance(m, Mapping) for m in value):
        wanted = f"not a text or messages (role, content){_field(value, column)}"
        raise BadRow(f"{column!r} is {_shown(value)}, {wanted}")
    messages = [_message(m, column) for m in value]
    if messages[-1]["role"] != "user":
        first = next((at for at, m in enumerate(messages) if m["role"] == "user"), 0)
        raise BadRow(
            f"{column!r} ends with a message of {messages[-1]['role']!r}, and the user's is answered: "
            f"data.settings.question={column}.{first}.{said} takes the first alone"
        )
    _check_filled(column, messages[-1]["content"])
    return messages


def _field(value: Any, column: str) -> str:
    record = isinstance(value, Mapping) and value
    return f": data.settings.question={column}.{next(iter(value))} names a field of it" if record else ""


def _message(message: Message, column: str) -> Message:
    """Without its nulls, which Parquet puts where other rows have a value; its parts of text joined."""
    content = message_text(message)
    if not isinstance(content, str) or not isinstance(message.get("role"), str):
        raise BadRow(f"{column!r} has a message {_shown(message)} without role and content as texts")
    _check_encoding(column, content)
    return {name: value for name, value in message.items() if value is not None} | {"content": content}


def _value(row: Row, column: str) -> Any:
    try:
        return lookup(row, column)
    except KeyError:
        inner = [f"{name}.{key}" for name, v in row.items() if isinstance(v, Mapping) for key in v]
        known = ", ".join(map(str, [*row, *inner])) or "none"
        if isinstance(text := row.get(column.partition(".")[0]), str):
            known = f"{known}; it is not within {_shown(text)}, read as JSON or as Python"
        raise BadRow(f"no {column!r} (columns: {known})") from None


def _check_filled(column: str, text: str) -> None:
    if not text.strip():
        raise BadRow(f"{column!r} is {text!r}, which is empty")
    _check_encoding(column, text)


def _check_encoding(column: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BadRow(f"{column!r} is not UTF-8 (a lone surrogate)") from None


def _shown(value: Any) -> str:
    return textwrap.shorten(repr(value), 200, placeholder=" ...")
