"""Responses as HTML, shaded by entropy, for the page of an evaluation."""

import math
from collections.abc import Iterable
from html import escape
from itertools import islice
from typing import NamedTuple

LONGEST = 400
"""Tokens shown of a response."""


class ShadedToken(NamedTuple):
    """One token of a response; `entropy` (nats) is NaN if nobody drew it, `note` is its tooltip."""

    text: str
    entropy: float
    note: str


def shade_response(caption: str, tokens: Iterable[ShadedToken], length: int, top: float) -> str:
    """A response of `length` tokens as a <figure>, darker up to `top` nats; `caption` is HTML."""
    spans = "".join(_span(token, top) for token in islice(tokens, LONGEST))
    more = f" … {length - LONGEST} tokens more" if length > LONGEST else ""
    return f'<figure class="response"><figcaption>{caption}</figcaption><p>{spans}{more}</p></figure>'


def _span(token: ShadedToken, top: float) -> str:
    shade = f' style="--h:{max(token.entropy, 0.0) / top:.2f}"' if math.isfinite(token.entropy) else ""
    text = escape(token.text).replace("\n", "⏎\n")
    return f'<span{shade} title="{escape(token.note)}">{text}</span>'
