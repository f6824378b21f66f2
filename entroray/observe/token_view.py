"""Tokens as HTML: responses shaded by entropy, and the most uncertain tokens of a record file in context."""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from html import escape
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

ROWS, AROUND, RESPONSES, LONGEST = 20, 12, 3, 400
"""Tokens in the table, tokens of context on either side, responses shown, tokens shown of a response."""
HEAD = ("entropy", "varentropy", "probability", "advantage", "right", "prompt", "rollout", "in context")


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


@dataclass(frozen=True)
class TokenView:
    """The columns of one record file, and the texts of its token ids."""

    columns: dict[str, NDArray]
    words: dict[str, str]

    def text(self, i: int) -> str:
        """The text of token `i`; its id if the vocabulary has none."""
        token = str(self.columns["token_id"][i])
        return self.words.get(token, f"⟨{token}⟩")

    def shaded(self, i: int) -> ShadedToken:
        """Token `i` with its numbers, or with the reason why it is masked."""
        c, entropy = self.columns, float(self.columns["entropy"][i])
        if not math.isfinite(entropy):
            return ShadedToken(self.text(i), math.nan, str(c["mask_reason"][i]))
        numbers = f"p {np.exp(c['logprob_old'][i]):.3f}, advantage {c['advantage'][i]:+.3f}"
        return ShadedToken(self.text(i), entropy, f"H {entropy:.3f} nats, {numbers}")

    def response(self, i: int) -> tuple[int, int]:
        """First token of the rollout that token `i` is in, and the one after its last."""
        rollout = self.columns["rollout"]
        first, after = (np.searchsorted(rollout, rollout[i], side) for side in ("left", "right"))
        return int(first), int(after)

    def most_uncertain(self) -> list[int]:
        """Tokens that count in the aggregates, by falling entropy."""
        counted = self.columns["counted"]
        order = np.argsort(-np.where(counted, self.columns["entropy"], -np.inf), kind="stable")
        return [int(i) for i in order[: int(counted.sum())]]


def load_token_view(file: Path) -> TokenView:
    """One record file and the vocabulary beside it."""
    table = pq.read_table(file).combine_chunks()
    columns = {name: table[name].to_numpy(zero_copy_only=False) for name in table.column_names}
    columns["counted"] = table["mask_reason"].is_null().to_numpy()
    vocabulary = file.with_name("vocabulary.json")
    words = json.loads(vocabulary.read_text(encoding="utf-8")) if vocabulary.exists() else {}
    return TokenView(columns, words)


def uncertain_table(view: TokenView) -> str:
    """The tokens of highest entropy (nats), each between the tokens around it."""
    lines = [_line(view, i) for i in view.most_uncertain()[:ROWS]]
    cells = "".join(f"<th>{name}</th>" for name in HEAD)
    return f'<table class="tokens"><tr>{cells}</tr>{"".join(lines)}</table>'


def uncertain_responses(view: TokenView) -> str:
    """The responses that hold the most uncertain tokens, each token shaded by its entropy."""
    found: dict[tuple[int, int], None] = {}
    for i in view.most_uncertain():
        found.setdefault(view.response(i))
        if len(found) == RESPONSES:
            break
    top = float(np.nanmax(view.columns["entropy"].astype(float), initial=1e-9))
    return "".join(
        shade_response(_caption(view, start, stop), map(view.shaded, range(start, stop)), stop - start, top)
        for start, stop in found
    )


def _line(view: TokenView, i: int) -> str:
    c, (start, stop) = view.columns, view.response(i)
    shown = lambda at: escape(view.text(at)).replace("\n", "⏎")
    before = "".join(map(shown, range(max(start, i - AROUND), i)))
    after = "".join(map(shown, range(i + 1, min(stop, i + AROUND + 1))))
    numbers = [c["entropy"][i], c["varentropy"][i], np.exp(c["logprob_old"][i])]
    cells = [*(f"{x:.3f}" for x in numbers), f"{c['advantage'][i]:+.3f}", "yes" if c["correct"][i] else "no"]
    cells += [escape(str(c["prompt_id"][i])[:10]), str(c["rollout"][i])]
    context = f'<td class="context">{before}<mark>{shown(i)}</mark>{after}</td>'
    return f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}{context}</tr>"


def _caption(view: TokenView, start: int, stop: int) -> str:
    c = view.columns
    return (
        f"rollout {c['rollout'][start]} of prompt {escape(str(c['prompt_id'][start])[:10])}, "
        f"reward {c['reward'][start]:.2f}, {c['status'][start]}, {stop - start} tokens"
    )
