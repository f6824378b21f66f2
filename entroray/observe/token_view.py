"""Token records as HTML: the most uncertain tokens in context, whole responses shaded by entropy."""

import json
from dataclasses import dataclass
from html import escape
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

ROWS, AROUND, RESPONSES, LONGEST = 20, 12, 3, 400

HEAD = ("entropy", "varentropy", "probability", "advantage", "right", "prompt", "rollout", "in context")


@dataclass(frozen=True)
class TokenView:
    """The columns of one record file, and what its token ids say."""

    columns: dict[str, NDArray]
    words: dict[str, str]

    def text(self, i: int) -> str:
        """Token `i`, escaped, with its line breaks made visible."""
        token = str(self.columns["token_id"][i])
        return escape(self.words.get(token, f"⟨{token}⟩")).replace("\n", "⏎")

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
    """One record file and the vocabulary beside it; without the vocabulary, tokens are shown by id."""
    table = pq.read_table(file).combine_chunks()
    columns = {name: table[name].to_numpy(zero_copy_only=False) for name in table.column_names}
    columns["counted"] = table["mask_reason"].is_null().to_numpy()
    vocabulary = file.with_name("vocabulary.json")
    words = json.loads(vocabulary.read_text(encoding="utf-8")) if vocabulary.exists() else {}
    return TokenView(columns, words)


def uncertain_table(excerpt: TokenView) -> str:
    """The tokens of highest entropy (nats), each between the tokens around it."""
    lines = [_line(excerpt, i) for i in excerpt.most_uncertain()[:ROWS]]
    cells = "".join(f"<th>{name}</th>" for name in HEAD)
    return f'<table class="tokens"><tr>{cells}</tr>{"".join(lines)}</table>'


def shaded_responses(excerpt: TokenView) -> str:
    """The responses that hold the most uncertain tokens, each token shaded by its entropy."""
    shown: list[tuple[int, int]] = []
    for i in excerpt.most_uncertain():
        if len(shown) == RESPONSES:
            break
        if excerpt.response(i) not in shown:
            shown.append(excerpt.response(i))
    top = float(np.nanmax(excerpt.columns["entropy"].astype(float), initial=1e-9))
    return "".join(_shaded(excerpt, start, stop, top) for start, stop in shown)


def _line(excerpt: TokenView, i: int) -> str:
    c = excerpt.columns
    start, stop = excerpt.response(i)
    before = "".join(map(excerpt.text, range(max(start, i - AROUND), i)))
    after = "".join(map(excerpt.text, range(i + 1, min(stop, i + AROUND + 1))))
    context = f"{before}<mark>{excerpt.text(i)}</mark>{after}"
    numbers = [c["entropy"][i], c["varentropy"][i], np.exp(c["logprob_old"][i])]
    cells = "".join(f"<td>{x:.3f}</td>" for x in numbers) + f"<td>{c['advantage'][i]:+.3f}</td>"
    where = (
        f"<td>{'yes' if c['correct'][i] == 1 else 'no'}</td><td>{escape(str(c['prompt_id'][i])[:10])}</td>"
    )
    return f'<tr>{cells}{where}<td>{c["rollout"][i]}</td><td class="context">{context}</td></tr>'


def _shaded(excerpt: TokenView, start: int, stop: int, top: float) -> str:
    c = excerpt.columns
    spans = "".join(_span(excerpt, i, top) for i in range(start, min(stop, start + LONGEST)))
    more = f" … {stop - start - LONGEST} tokens more" if stop - start > LONGEST else ""
    caption = (
        f"rollout {c['rollout'][start]} of prompt {escape(str(c['prompt_id'][start])[:10])}, "
        f"reward {c['reward'][start]:.2f}, {c['status'][start]}, {stop - start} tokens"
    )
    return f'<figure class="response"><figcaption>{caption}</figcaption><p>{spans}{more}</p></figure>'


def _span(excerpt: TokenView, i: int, top: float) -> str:
    c = excerpt.columns
    entropy = float(c["entropy"][i])
    if not np.isfinite(entropy):
        return f'<span title="{c["mask_reason"][i]}">{excerpt.text(i)}</span>'
    shade = f"background:rgba(79,70,229,{0.75 * max(entropy, 0) / top:.2f})"
    note = f"H {entropy:.3f} nats, p {np.exp(c['logprob_old'][i]):.3f}, advantage {c['advantage'][i]:+.3f}"
    return f'<span style="{shade}" title="{note}">{excerpt.text(i)}</span>'
