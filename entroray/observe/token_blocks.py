"""The tokens of a recorded step for report.html: quantised columns in one gzip block, decoded by the page."""

import itertools
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from entroray.observe import token_records
from entroray.observe.journal import plain

FLOATS = ("entropy", "varentropy", "logprob_old", "logprob_behavior", "advantage", "scale", "temperature")
MORE = ("sampler_entropy", "sampler_varentropy", "sampler_temperature", "vocabulary_entropy", "kept_mass")
INTEGERS = ("version", "kept_size", "selected")
OF_ROLLOUT = ("prompt_id", "reward", "correct", "parts", "status", "replayed")
"""Columns of the token records that say the same at each token of a rollout."""
WANTED = ("rollout", "token_id", "mask_reason", *FLOATS, *MORE, *INTEGERS, *OF_ROLLOUT)
CUT = "\ufffd"
"""What a tokenizer makes of a token that is a part of a character."""


@dataclass(frozen=True)
class StepTokens:
    """Tokens of a step that are shown, in `columns`; `rollouts` has a row for each of `starts`."""

    step: int
    recorded: int
    """Tokens in the file; more than are here if some were left out."""
    columns: Mapping[str, NDArray]
    masks: Sequence[str]
    """What the codes of the column `mask_reason` stand for; the code after the last is none."""
    starts: NDArray[np.int64]
    rollouts: Sequence[Mapping[str, Any]]
    words: Mapping[str, str]


def load_step(run_dir: Path, file: Path, most: int) -> StepTokens:
    """One record file and what lies beside it, sampled by whole groups beyond `most` tokens.

    ValueError or OSError if it is damaged, or is no token record.
    """
    with pa.OSFile(str(file)) as opened:  # one file, whatever takes its name meanwhile
        known = pq.read_schema(opened).names
        check_columns(known)
        rows = _column(pq.read_table(opened, columns=["rollout"]), "rollout").astype(np.int64)
        about = _rollout_records(run_dir, token_records.step_of(file))
        chosen = _chosen(rows, {r["rollout"]: r["group"] for r in about}, most)
        only = None if chosen is None else [("rollout", "in", chosen)]
        table = pq.read_table(opened, columns=[n for n in WANTED if n in known], filters=only)
    columns = {n: _column(table, n) for n in table.column_names if n not in (*OF_ROLLOUT, "mask_reason")}
    masks = _dictionary(table["mask_reason"]) if "mask_reason" in known else None
    if masks:
        columns["mask_reason"] = masks[0]
    count, rows = len(rows), columns["rollout"]
    starts = np.flatnonzero(np.diff(rows, prepend=-1) != 0)
    shown = [r for r in about if chosen is None or r["rollout"] in set(chosen)] or _bare(table, rows, starts)
    step = token_records.step_of(file)
    return StepTokens(step, count, columns, masks[1] if masks else [], starts, shown, _vocabulary(file))


def check_columns(names: Sequence[str]) -> None:
    """ValueError unless a file with these columns is one of token records."""
    if not {"rollout", "token_id"} <= set(names):
        raise ValueError("it has no columns rollout and token_id")


def _vocabulary(file: Path) -> dict[str, str]:
    """Text by token id, beside the record file; empty where it is missing or cut short: ids are shown."""
    try:
        words = json.loads(file.with_name("vocabulary.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {i: text for i, text in words.items() if isinstance(text, str)} if isinstance(words, dict) else {}


def encode_step(tokens: StepTokens) -> bytes:
    """The block: gzip of a length (32 bits), a JSON header, and the planes of each column.

    A column is a constant, an integer above a minimum, or a 16-bit float rounded to 8 significant bits
    (0.4 %), each byte of a value in a plane of its own, low byte first.
    """
    word, words = _words(tokens)
    header: dict[str, Any] = {"step": tokens.step, "recorded": tokens.recorded, "tokens": len(word)}
    header |= {"words": words, "masks": tokens.masks, "rollouts": tokens.rollouts}
    header["starts"] = tokens.starts.tolist()
    header["rows"] = tokens.columns["rollout"][tokens.starts].tolist()
    columns = dict(tokens.columns)
    if {"logprob_old", "logprob_behavior"} <= set(columns):  # a gap of 1e-7 nats is none of rounded numbers
        columns["gap"] = columns["logprob_old"] - columns.pop("logprob_behavior")
    packed = [_packed("word", word)]
    packed += [_packed(n, c) for n, c in columns.items() if n not in ("rollout", "token_id")]
    header["columns"] = [about for about, _ in packed]
    head = json.dumps(plain(header)).encode()
    packer = zlib.compressobj(level=6, wbits=31, strategy=zlib.Z_FILTERED)  # 9 is 14 times slower
    parts = [len(head).to_bytes(4, "little"), head, *(planes for _, planes in packed)]
    return b"".join([*map(packer.compress, parts), packer.flush()])


def _column(table: pa.Table, name: str) -> NDArray:
    """Numbers; a null is NaN in a float, and in an integer."""
    column = table[name]
    if pa.types.is_float16(column.type):
        column = column.cast(pa.float32())
    return column.to_numpy()


def _dictionary(column: pa.ChunkedArray) -> tuple[NDArray, list[str]]:
    """Codes and what they stand for; a null has the code after the last."""
    whole = pa.chunked_array([column.combine_chunks()]).dictionary_encode()
    if pa.types.is_dictionary(column.type):
        whole = column.unify_dictionaries()
    words = whole.chunk(0).dictionary.to_pylist() if whole.num_chunks else []
    codes = [c.indices.fill_null(len(words)).to_numpy() for c in whole.chunks]
    return np.concatenate([np.empty(0, np.int64), *codes]).astype(np.int64), words


def _rollout_records(run_dir: Path, step: int) -> list[dict[str, Any]]:
    """Rollouts of the step; [] where they were not recorded, or their file is damaged."""
    file = token_records.record_path(run_dir, step, "rollouts")
    try:
        rows = pq.read_table(file).to_pylist()
    except (OSError, ValueError):  # Arrow's errors are both
        return []
    return [r for r in rows if r.get("rollout") is not None and r.get("group") is not None]


def _bare(table: pa.Table, rows: NDArray, starts: NDArray) -> list[dict[str, Any]]:
    """What the token records say of their rollouts; groups are runs of one prompt."""
    said = table.select([n for n in OF_ROLLOUT if n in table.column_names]).take(pa.array(starts)).to_pylist()
    prompts = [r.get("prompt_id") for r in said]
    group = np.cumsum([0, *(a != b for a, b in itertools.pairwise(prompts))]).tolist()
    length = np.diff([*starts, len(rows)]).tolist()
    own = zip(said, rows[starts].tolist(), group, length, strict=False)
    return [r | {"rollout": row, "group": g, "length": n} for r, row, g, n in own]


def _chosen(rows: NDArray, group_of: Mapping[int, int], most: int) -> list[int] | None:
    """Rollouts of groups evenly apart that hold at most `most` tokens; None if all do."""
    if len(rows) <= most:
        return None
    ids, counts = np.unique(rows, return_counts=True)
    groups = np.array([group_of.get(int(i), int(i)) for i in ids])
    names = np.unique(groups)
    every = -(-len(rows) // most)
    kept = np.isin(groups, names[::every])
    kept &= np.cumsum(np.where(kept, counts, 0)) <= max(most, counts[kept][0])
    return ids[kept].tolist()


def _packed(name: str, values: NDArray) -> tuple[dict[str, Any], bytes]:
    numbers = values.astype(np.float64)
    finite = numbers[np.isfinite(numbers)]
    if not len(finite) or (len(finite) == len(numbers) and (finite == finite[0]).all()):
        return {"name": name, "kind": "constant", "value": float(finite[0]) if len(finite) else None}, b""
    if name in (*FLOATS, *MORE, "gap"):
        unit = 1e-3 if name == "gap" else 1.0
        bits = np.clip(numbers / unit, -60000, 60000).astype(np.float16).view(np.uint16).astype(np.uint32)
        bits = np.where(np.isnan(numbers), 0x7E00, (bits + 4) & 0xFFF8).astype("<u2")
        return {"name": name, "kind": "float", "unit": unit}, bits.view(np.uint8).reshape(-1, 2).T.tobytes()
    low = int(finite.min())
    whole = np.where(np.isfinite(numbers), numbers - low + 1, 0).astype("<u4")  # 0: null
    wide = max(1, (int(whole.max()).bit_length() + 7) // 8)
    planes = whole.view(np.uint8).reshape(-1, 4)[:, :wide].T.tobytes()
    return {"name": name, "kind": "integer", "low": low - 1, "wide": wide}, planes


def _words(tokens: StepTokens) -> tuple[NDArray, list[list[Any]]]:
    """A code for each token, and [id, text] of each code; the text is null in a cell that began before.

    A character that is cut across tokens is one cell, read from the response; so is a space that the
    vocabulary's text lacks.
    """
    ids, code = np.unique(tokens.columns["token_id"], return_inverse=True)
    texts = [tokens.words.get(str(i), "") for i in ids]
    words: dict[tuple[int, str | None], int] = {
        (int(i), t): n for n, (i, t) in enumerate(zip(ids, texts, strict=True))
    }
    responses = {r["rollout"]: r.get("response") for r in tokens.rollouts}
    for start, stop in zip(tokens.starts, [*tokens.starts[1:], len(code)], strict=False):
        own = [texts[c] for c in code[start:stop]]
        response = responses.get(int(tokens.columns["rollout"][start]))
        if CUT in (joined := "".join(own)) or (response and not joined.startswith(response)):
            for i, cell in enumerate(cells(own, response or ""), start):
                key = int(ids[code[i]]), cell
                if cell != texts[code[i]]:
                    code[i] = words.setdefault(key, len(words))
    return code, [[i, text] for i, text in words]


def cells(texts: Sequence[str], response: str) -> Iterator[str | None]:
    """The text of each token in `response`; None for one that ends a character begun before it."""
    at, i = 0, 0
    while i < len(texts):
        after = i + 1
        if CUT not in texts[i]:
            found = response.find(texts[i], at, at + len(texts[i]) + 8) if texts[i] else -1
            yield texts[i] if found < 0 else response[at : found + len(texts[i])]
            at = at if found < 0 else found + len(texts[i])
        else:
            while after < len(texts) and CUT in texts[after]:
                after += 1
            most = at + 4 * (after - i)
            follows = texts[after] if after < len(texts) else ""
            found = response.find(follows, at + 1, most + len(follows)) if follows else -1
            end = found if found >= 0 else len(response) if at < len(response) <= most else at
            yield response[at:end] or CUT
            yield from [None] * (after - i - 1)
            at = end
        i = after
