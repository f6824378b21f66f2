"""One self-contained page about a run: report.html, readable without a network."""

import base64
import hashlib
import json
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

from entroray.observe import css, token_blocks, token_records
from entroray.observe.journal import plain, replace_text
from entroray.observe.run_data import run_data

PAGE = Path(__file__).with_name("page")
POLICY = "default-src 'none'; base-uri 'none'; form-action 'none'"
SCRIPTS = ("parts.js", "charts.js", "block.js", "tokens.js", "unsure.js", "page.js")
BYTES = 8_300_000
"""Of all token blocks, as text; the page stays below 10 MB."""
DAMAGED = (OSError, ValueError, KeyError, TypeError, NotImplementedError)
"""Arrow's errors are all of these."""
DAMAGED_FILE = "Nothing from tokens/{}: it is damaged ({})."
NO_TOKENS = "Nothing from tokens/: no token was recorded (see the setting observe.tokens.every)."
TOKENS, SHARED = 1_000_000, 8
"""Most tokens of all recorded steps, of which each has this part at least if all have many."""


def write_report(run_dir: Path) -> Path:
    """Write `run_dir`/report.html from the files of the run; a missing file is a sentence on the page."""
    data = run_data(run_dir)
    blocks = _token_blocks(run_dir, [] if data["starting"] else data["notes"])
    data |= {"recorded": [step for step, _ in blocks], "columns": columns()}
    page, _ = render_page(data, POLICY, SCRIPTS, blocks)
    replace_text(run_dir / "report.html", page)
    return run_dir / "report.html"


def render_page(
    data: dict[str, Any], policy: str, scripts: Sequence[str], blocks: Sequence[tuple[int, str]] = ()
) -> tuple[str, str]:
    """The page of a run, and its content policy: `policy` and the page's own style and script."""
    script = "\n".join((PAGE / name).read_text(encoding="utf-8") for name in scripts)
    style = css.STYLE + (PAGE / "page.css").read_text(encoding="utf-8")
    page = (PAGE / "page.html").read_text(encoding="utf-8")
    policy = f"{policy}; style-src {_hash(style)}; script-src {_hash(script)}"
    for name, text in {
        "title": escape(f"{data['name']}: {data['objective']}"),
        "policy": policy,
        "style": style,
        "run": _inert(data),
        "blocks": "\n".join(f'<script type="text/plain" id="step-{n}">{text}</script>' for n, text in blocks),
        "scripts": script,
    }.items():
        page = page.replace(f"<!--{name}-->", text, 1)
    return page, policy


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _inert(data: Any) -> str:
    """JSON that ends no script element, opens no comment, and holds no half of a character."""
    return json.dumps(plain(data)).replace("<", "\\u003c").replace(">", "\\u003e")


def columns() -> list[list[str]]:
    """Name, unit and meaning of each column of the token records."""
    said = lambda field, key: (field.metadata or {}).get(key, b"").decode()
    return [[f.name, said(f, b"unit"), said(f, b"meaning")] for f in token_records.SCHEMA]


def _token_blocks(run_dir: Path, notes: list[str]) -> list[tuple[int, str]]:
    """The block of each recorded step as text; `notes` gets what is missing."""
    files, left = token_records.files(run_dir), BYTES
    if not files:
        notes.append(NO_TOKENS)
        return []
    most, blocks, damaged = TOKENS // min(len(files), SHARED), dict[int, str](), 0
    for file in _spread(files):
        try:
            text = _block(run_dir, file, most)
            while len(text) > left and not blocks and most:  # long prompts, or a cap above what was recorded
                most = int(most * 0.9 * left / len(text))
                text = _block(run_dir, file, most)
        except DAMAGED as error:
            notes.append(DAMAGED_FILE.format(file.name, error))
            damaged += 1
            continue
        if len(text) > left:
            break
        left -= len(text)
        blocks[token_records.step_of(file)] = text
    if len(blocks) + damaged < len(files):
        notes.append(f"Tokens of {len(blocks)} of {len(files)} recorded steps are here; all are in tokens/.")
    return sorted(blocks.items())


def _block(run_dir: Path, file: Path, most: int) -> str:
    return base64.b64encode(token_blocks.encode_step(token_blocks.load_step(run_dir, file, most))).decode()


def _spread(files: Sequence[Path]) -> Iterator[Path]:
    """The first, the last, then what halves the largest gaps, so that any beginning spans the run."""
    yield from dict.fromkeys([files[0], files[-1]])
    gaps = [(0, len(files) - 1)]
    for low, high in gaps:
        if high - low > 1:
            yield files[(low + high) // 2]
            gaps += [(low, (low + high) // 2), ((low + high) // 2, high)]
