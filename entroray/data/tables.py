"""Rows of a table: a file as people have it, a glob or a folder of shards, or a data set of the hub.

What a file is is read from its content first and its suffix second; each row comes with its place.
"""

import csv
import datetime
import glob
import io
import json
import math
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from decimal import Decimal
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import numpy as np

from entroray.errors import ConfigError, PreflightError

Row = Mapping[str, Any]
Lines = Iterator[tuple[int, Row | str]]
"""(number from 1; the row, or what is wrong with it)."""

JSON, SEPARATED, PACKED = (".jsonl", ".ndjson", ".json"), (".csv", ".tsv"), (".gz", ".bz2", ".zst")
SUFFIXES = (*JSON, *SEPARATED, ".parquet")
"""Of files that are read, in upper case too, and packed (`PACKED` behind them)."""
_CODECS = {b"\x1f\x8b": "gzip", b"BZ": "bz2", b"\x28\xb5": "zstd"}
_BOM = b"\xef\xbb\xbf"
_WIDE = (b"\xff\xfe", b"\xfe\xff", b"\0")
_BATCH = 1000
"""Rows of a data set of the hub that are objects in memory at once."""


def read_rows(
    source: str, subset: str | None, split: str, answer: str | None
) -> Iterator[tuple[str, Row | str]]:
    """(place, as in `line 3`; the row or what is wrong with it) of a file, of a glob's, else of a data set.

    Numbers of the column `answer` have the digits of their own width: 0.1 in four bytes is 0.1. Raises
    PreflightError for what cannot be read, ConfigError for a kind of file that is not read at all.
    """
    files = _find_files(source)
    if not files:
        yield from ((f"line {n}", row) for n, row in _data_set(source, subset, split, answer))
    for file in files:
        name = f"{file.name} " if len(files) > 1 else ""
        yield from ((f"{name}line {n}", row) for n, row in _read_file(file, answer))


def table_name(source: str) -> str:
    """A file's name without its suffixes, wherever it lies; of anything else the source itself."""
    name = Path(source).name
    while Path(name).suffix.lower() in (*SUFFIXES, *PACKED):
        name = Path(name).stem
    return source if name == Path(source).name else name


def lookup(row: Any, path: str) -> Any:
    """What lies at `a.b.0.c` in mappings and lists; a name with dots goes before its parts; else KeyError."""
    parts = path.split(".")
    for count in range(len(parts), 0, -1):
        name, rest = ".".join(parts[:count]), ".".join(parts[count:])
        if isinstance(row, Mapping) and name in row:
            return lookup(row[name], rest) if rest else row[name]
    if isinstance(row, list | tuple) and parts[0].removeprefix("-").isdigit():
        place, rest = int(parts[0]), ".".join(parts[1:])
        if -len(row) <= place < len(row):
            return lookup(row[place], rest) if rest else row[place]
    raise KeyError(path)


def message_text(message: Mapping[str, Any]) -> Any:
    """What a message says, its parts of text joined; anything else as it is."""
    content = message.get("content")
    if isinstance(content, list | tuple) and all(isinstance(p, Mapping) and "text" in p for p in content):
        return "".join(str(part["text"]) for part in content)
    return content


def written(value: Any) -> str | None:
    """A text as it is, a number in digits (1e-7 is 0.0000001, 5.0 is 5), a date as ISO 8601 has it.

    None for anything else, for numbers that are not finite too.
    """
    match value:
        case str():
            return value
        case bool() | np.bool_():
            return str(bool(value))
        case Integral():
            return str(int(value))
        case Decimal() if value.is_finite():
            return format(value, "f")
        case Real() if math.isfinite(value):
            return np.format_float_positional(value, trim="-")  # type: ignore[arg-type]  # takes what is real
        case datetime.date() | datetime.time():
            return str(value).removesuffix(" 00:00:00")
    return None


def _find_files(source: str) -> list[Path]:
    """Empty for a folder or a name of the hub, which `datasets` reads."""
    if "://" in source or not source:
        raise PreflightError(f"data.task={source!r} is no file here: download it first, and give its path")
    path = Path(os.path.expanduser(source))
    try:
        if path.is_file():
            return [path]
    except (OSError, ValueError) as error:  # a name too long, or with a zero byte
        raise PreflightError(f"data.task={source[:80]}: {error}; give the path of a file") from error
    if set("*?[") & set(source):
        found = [p for p in map(Path, sorted(glob.glob(str(path), recursive=True))) if p.is_file()]
        if not found:
            raise PreflightError(f"data.task={source}: no file matches {path.absolute()}")
        return found
    if not path.is_dir() and table_name(source) != source:
        raise PreflightError(f"data.task={source}: there is no file {path.absolute()}")
    return []


def _read_file(path: Path, answer: str | None) -> Lines:
    suffix = next((s.lower() for s in reversed(path.suffixes) if s.lower() in SUFFIXES), "")
    data = _content(path)
    _refuse_unreadable(path, data)
    if data.startswith(b"PAR1"):
        return _parquet(path, data, answer)
    if suffix in SEPARATED:
        return _separated(path, data)
    if suffix in JSON or data[:1000].removeprefix(_BOM).lstrip()[:1] in (b"{", b"["):
        return _json(path, data)
    if suffix:
        raise PreflightError(f"{path} cannot be read as Parquet: it does not begin with PAR1")
    raise ConfigError(
        f"data.task={path}: neither name nor content says what it is; {', '.join(SUFFIXES)} are read, "
        f"and each of them packed ({', '.join(PACKED)})"
    )


def _content(path: Path) -> bytes:
    """The bytes of a file, unpacked."""
    import pyarrow as pa

    try:
        data = path.read_bytes()
        codec = _CODECS.get(data[:2])
        return pa.CompressedInputStream(pa.BufferReader(data), codec).read() if codec else data
    except (OSError, ValueError) as error:
        raise PreflightError(f"{path} cannot be read: {error}") from error


def _refuse_unreadable(path: Path, data: bytes) -> None:
    """PreflightError for what is no table, by its first bytes, with what makes one of it."""
    if data.startswith(_WIDE):
        said = f"no UTF-8 (UTF-16 by its first bytes): {recoded(path.name, 'UTF-16')}"
    elif data.startswith(b"version https://git-lfs"):
        said = "a pointer of Git LFS, not the data: git lfs pull"
    elif data.startswith(b"PK\x03\x04"):
        said = "a zip archive or a workbook: unpack it, or save the sheet as .csv"
    else:
        return
    raise PreflightError(f"data.task: {path} is {said}")


def recoded(name: str, encoding: str) -> str:
    """The command that makes UTF-8 of a file."""
    return f"iconv -f {encoding} -t UTF-8 {name} > utf8-{name}"


def _decoded(path: Path, data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise PreflightError(
            f"data.task: {path} is not UTF-8 in line {line}, at byte {error.start}: "
            f"{recoded(path.name, 'LATIN1')}"
        ) from error


# Text.


def _json(path: Path, data: bytes) -> Lines:
    """An object a line, or one array of objects."""
    numbered = ((n, raw.removeprefix(_BOM)) for n, raw in enumerate(data.splitlines(), 1))
    lines = [(n, raw) for n, raw in numbered if raw.strip()]
    rows = _array(path, data, [raw.strip() for _, raw in lines[:2]])
    if rows is not None:
        return ((n, _object(row)) for n, row in enumerate(rows, 1))
    return ((n, _line(raw)) for n, raw in lines)


def _array(path: Path, data: bytes, begin: list[bytes]) -> list[Any] | None:
    """The rows of a file that is one JSON array; None where its first two lines say that a row is a line."""
    spread = begin[:1] in ([b"{"], [b"["])
    if not begin or not (spread or begin[0].startswith(b"[")) or (begin[1:] and _is_json(begin[0])):
        return None
    try:
        document = json.loads(_decoded(path, data))
    except (ValueError, RecursionError) as error:
        raise PreflightError(
            f"data.task: {path} is no JSON array ({error}), nor has it an object a line: "
            f"jq -c . {path.name} > rows.jsonl"
        ) from error
    if isinstance(document, list):
        return document
    raise PreflightError(
        f"data.task: {path} is one object ({', '.join(list(document)[:5])}) and no list of rows: "
        f"jq -c '.{next(iter(document), '')}[]' {path.name} > rows.jsonl"
    )


def _is_json(raw: bytes) -> bool:
    try:
        json.loads(raw)
    except (ValueError, RecursionError):
        return False
    return True


def _line(raw: bytes) -> Row | str:
    try:
        return _object(json.loads(raw.decode()))
    except UnicodeDecodeError as error:
        return f"not UTF-8 at byte {error.start}"
    except (ValueError, RecursionError) as error:
        return f"not JSON: {error}"


def _object(value: Any) -> Row | str:
    return value if isinstance(value, dict) else f"a {type(value).__name__}, not an object"


def _separated(path: Path, data: bytes) -> Lines:
    """Fields of a header, separated by whichever of , ; | and tab is there most often; all are texts."""
    text = _decoded(path, data)
    csv.field_size_limit(sys.maxsize)
    table = text.lstrip("\r\n")
    before = len(text[: len(text) - len(table)].splitlines())
    separator = max(",;\t|", key=table.partition("\n")[0].count)
    reader = csv.DictReader(io.StringIO(table, newline=""), delimiter=separator)
    reader.fieldnames = names = [name.strip() for name in reader.fieldnames or ()]
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise PreflightError(f"{path} line {before + 1}: two columns are called {twice[0]!r}: rename one")
    try:
        for row in reader:
            yield before + reader.line_num, f"more than {len(names)} fields" if None in row else row
    except csv.Error as error:
        raise PreflightError(f"{path} line {before + reader.line_num}: {error}") from error


# Columns.


def _parquet(path: Path, data: bytes, answer: str | None) -> Lines:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        yield from _arrow_rows(pq.ParquetFile(pa.BufferReader(data)).iter_batches(), answer)
    except (OSError, ValueError) as error:
        raise PreflightError(f"{path} cannot be read as Parquet: {error}") from error


def _data_set(name: str, subset: str | None, split: str, answer: str | None) -> Lines:
    import datasets

    try:
        data = datasets.load_dataset(name, subset, split=split)
    except (
        OSError,
        ValueError,
        RuntimeError,
        datasets.exceptions.DatasetsError,
    ) as error:  # offline, no split
        raise PreflightError(
            f"data.task={name} is no file and no data set (subset {subset}, split {split}): {error}"
        ) from error
    yield from _arrow_rows(data.with_format("arrow").iter(batch_size=_BATCH), answer)


def _arrow_rows(batches: Iterable[Any], answer: str | None) -> Lines:
    """Rows of record batches, plain Python; a text that is not UTF-8 spoils its own row alone."""
    before = 0
    for batch in batches:
        kinds = {field.name: field.type for field in batch.schema}
        column = answer if answer in kinds else (answer or "").partition(".")[0]
        narrow = column if "float" in str(kinds.get(column)) else None  # also within structs and lists
        for line, row in enumerate(_objects(batch), before + 1):
            if narrow and isinstance(row, dict):
                row |= {narrow: _shortest(row[narrow], kinds[narrow])}
            yield line, row
        before += batch.num_rows


def _objects(batch: Any) -> list[Any]:
    try:
        return batch.to_pylist()
    except (ValueError, OverflowError):
        return [_object_at(batch, index) for index in range(batch.num_rows)]


def _object_at(batch: Any, index: int) -> Row | str:
    try:
        return batch.slice(index, 1).to_pylist()[0]
    except UnicodeDecodeError as error:
        return f"not UTF-8 at byte {error.start}"
    except (ValueError, OverflowError) as error:
        return f"cannot be read: {error}"


def _shortest(value: Any, kind: Any) -> Any:
    """Floats of two or four bytes as the shortest decimals that are these, within structs and lists too."""
    if value is None or "float" not in str(kind):
        return value
    if isinstance(value, dict):
        return {field.name: _shortest(value[field.name], field.type) for field in kind}
    if isinstance(value, list) and "map<" in str(kind):
        return [(key, _shortest(each, kind.item_type)) for key, each in value]
    if isinstance(value, list):
        return [_shortest(each, kind.value_type) for each in value]
    return float(str(np.dtype(kind.to_pandas_dtype()).type(value)))
