"""Secrets of the environment, passwords and tokens in URLs: nothing that is shown or written has them."""

import json
import os
import re
from functools import lru_cache
from typing import Any, TextIO
from urllib.parse import quote

NAMED = re.compile(
    r"(?!.*_(PATH|FILE|DIR|HOME|ROOT|SOCK|MODE|NAME|ENV)$)"
    r".*(TOKEN|KEYS?|SECRETS?|PASS(WORDS?|WD|PHRASE)?|_PWD|_PAT|CREDENTIALS?|AUTH|COOKIE|WEBHOOK)\d*(_|$)"
)
"""The name of a variable that holds a secret, and not where one is."""
IN_URL = re.compile(
    r"(?<=://)(?:[^/@\s:\[]*:(?!\d{1,5}/)[^\s\"'<>]+|[^/@\s:]*:[^/\s]+|[^/@\s:]{16,})(?=@)"
    r"|(?<=[?&])(?:[\w-]*[_-])?(?i:(?:access|auth)?token|(?:api)?key|secret|passw(?:or)?d|signature)=[^&#\s\"'<>]+"
)
"""A name and a password, or a token, before the host; a key or a token in the query."""
SHORTEST = 8
"""Characters of a variable's value that is looked for in texts."""
STARS = "***"


@lru_cache(maxsize=4096)  # every string that is journalled asks it of every variable
def is_secret(name: str, value: str) -> bool:
    """Whether the value of this variable of the environment is nobody else's."""
    return bool(NAMED.match(name.upper()) or IN_URL.search(value))


def secrets() -> dict[str, str]:
    """Value -> name of the secret variables that are long enough to be told from other words."""
    held = {v.strip(): n for n, v in os.environ.items() if is_secret(n, v)}
    return {value: name for value, name in held.items() if len(value) >= SHORTEST and not value.isdecimal()}


def hide_secrets(text: str) -> str:
    """`text` with *** in place of each."""
    for value in sorted(secrets(), key=len, reverse=True):
        for written in {value, quote(value, safe=""), json.dumps(value)[1:-1]}:
            text = text.replace(written, STARS)
    return IN_URL.sub(STARS, text)


class HidingStream:
    """Writes to another stream what `hide_secrets` makes of it."""

    def __init__(self, stream: TextIO):
        self.stream = stream

    def write(self, text: str) -> int:
        self.stream.write(hide_secrets(text))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)
