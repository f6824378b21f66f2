"""Rows of a text file: an object a line, one array of objects, or fields behind a header.

A file is read as it is unpacked; what is no such text is refused with the command that makes one of it.
"""

import csv
import io
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain, count, islice
from pathlib import Path
from typing import IO, Any, AnyStr

from entroray.errors import ConfigError, PreflightError

Row = Mapping[str, Any]
Lines = Iterator[tuple[int, Row | str]]
"""(number from 1; the row, or what is wrong with it)."""

JSON, SEPARATED, PACKED = (".jsonl", ".ndjson", ".json"), (".csv", ".tsv"), (".gz", ".bz2", ".zst")
SUFFIXES = (*JSON, *SEPARATED, ".parquet")
"""Of files that are read, in upper case too, and packed (`PACKED` behind them)."""
_CODECS = {b"\x1f\x8b": "gzip", b"BZ": "bz2", b"\x28\xb5": "zstd"}
_BOM = b"\xef\xbb\xbf"
_ENCODINGS = (
    (rb"\xff\xfe\0\0|\0\0\xfe\xff", "UTF-32"),
    (rb"\xff\xfe|\xfe\xff", "UTF-16"),
    (rb"\0\0\0[^\0]", "UTF-32BE"),
    (rb"[^\0]\0\0\0", "UTF-32LE"),
    (rb"[^\0]\0", "UTF-16LE"),
    (rb"\0", "UTF-16BE"),
)
"""How a file that is no UTF-8 begins, with a mark or, its first letter being of ASCII, without."""
LONGEST = 64 << 20
"""Bytes of a line, characters of a field."""
_WRAPPERS = ("data", "rows", "examples", "items", "instances", "samples", "records")
"""Under which name a document holds its rows, beside others."""


def read_text(path: Path, begin: bytes, _: str | None) -> Lines:
    """The rows of a file that begins so; ConfigError for a kind of file that is not read at all."""
    suffix = next((s.lower() for s in reversed(path.suffixes) if s.lower() in SUFFIXES), "")
    if suffix in SEPARATED:
        read = _separated
    elif suffix in JSON or begin.replace(_BOM, b"").lstrip()[:1] in (b"{", b"["):
        read = _json
    elif suffix:
        raise PreflightError(f"{path} cannot be read as Parquet: it does not begin with PAR1")
    else:
        raise ConfigError(
            f"data.task={path}: neither name nor content says what it is; {', '.join(SUFFIXES)} are read, "
            f"and each of them packed ({', '.join(PACKED)})"
        )
    try:
        with content(path) as file:
            yield from read(path, file)
    except (OSError, EOFError) as error:
        raise PreflightError(f"{path} cannot be read: {error}") from error


def content(path: Path) -> io.BufferedReader:
    """A file, unpacked as it is read."""
    import pyarrow as pa

    try:
        file = path.open("rb")
        codec = _CODECS.get(file.peek(2)[:2])
        return io.BufferedReader(pa.CompressedInputStream(file, codec)) if codec else file
    except (OSError, ValueError) as error:
        raise PreflightError(f"{path} cannot be read: {error}") from error


def head(path: Path, file: io.BufferedReader) -> bytes:
    """As many as 1000 first bytes, left where they are."""
    try:
        return file.peek(1000)[:1000]
    except (OSError, ValueError) as error:
        raise PreflightError(f"{path} cannot be read: {error}") from error


def refuse_unreadable(path: Path, begin: bytes) -> None:
    """PreflightError for what is no table, by its first bytes, with what makes one of it."""
    encoding = next((name for pattern, name in _ENCODINGS if re.match(pattern, begin, re.DOTALL)), None)
    if encoding:
        said = f"no UTF-8 ({encoding} by its first bytes): {recoded(path.name, encoding)}"
    elif begin.startswith(b"version https://git-lfs"):
        said = "a pointer of Git LFS, not the data: git lfs pull"
    elif begin.startswith(b"PK\x03\x04"):
        said = "a zip archive or a workbook: unpack it, or save the sheet as .csv"
    else:
        return
    raise PreflightError(f"data.task: {path} is {said}")


def refuse_repeated(place: str, names: Iterable[str]) -> None:
    """PreflightError for columns of one name, of which the last would silently win."""
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise PreflightError(f"{place}: two columns are called {twice[0]!r}: rename one")


def recoded(name: str, encoding: str) -> str:
    """The command that makes UTF-8 of a file."""
    return f"iconv -f {encoding} -t UTF-8 {name} > utf8-{name}"


def _lines(path: Path, file: IO[AnyStr]) -> Iterator[AnyStr]:
    """Those of a file; PreflightError for one that is no row, before it fills the memory."""
    blank = True
    for number in count(1):
        line = file.readline(LONGEST)
        array = blank and isinstance(line, bytes) and _unmarked(line[:1000]).lstrip()[:1] == b"["
        if len(line) == LONGEST and not array:  # which may lie in one line
            raise PreflightError(
                f"data.task: {path} line {number} is longer than {LONGEST >> 20} MiB: put one row in a line, "
                "and what is large elsewhere"
            )
        blank = blank and not line.strip()
        if line:
            yield line
        if not line or len(line) == LONGEST:
            return


def _decoded(path: Path, most: int = -1) -> str:
    with content(path) as file:
        data = file.read(most)
    if len(data) == most:
        raise PreflightError(
            f"data.task: {path} is one document of more than {most >> 20} MiB, which is read whole: "
            f"jq -c '.[]' {path.name} > rows.jsonl"
        )
    try:
        return data.decode().lstrip("\ufeff")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise PreflightError(
            f"data.task: {path} is not UTF-8 in line {line}, at byte {error.start}: "
            f"{recoded(path.name, 'LATIN1')}"
        ) from error


# Text.


def _json(path: Path, file: io.BufferedReader) -> Lines:
    """An object a line, or one array of objects."""
    pieces = (piece for raw in _lines(path, file) for piece in (raw.splitlines() if b"\r" in raw else (raw,)))
    lines = ((n, _unmarked(raw)) for n, raw in enumerate(pieces, 1))
    filled = ((n, raw) for n, raw in lines if raw.strip())
    first = list(islice(filled, 2))
    begin = [raw.strip() for _, raw in first]
    spread = begin[:1] in ([b"{"], [b"["])
    if spread or (begin and begin[0].startswith(b"[") and not (begin[1:] and _is_json(begin[0]))):
        yield from _document(path)
        return
    if len(begin) == 1:
        _refuse_wrapped(path, _line(begin[0]))
    yield from ((n, _line(raw)) for n, raw in chain(first, filled))


def _unmarked(raw: bytes) -> bytes:
    while raw.startswith(_BOM):
        raw = raw[len(_BOM) :]
    return raw


def _document(path: Path) -> Lines:
    """The rows of a file that is one JSON array; PreflightError for what else is no row a line."""
    try:
        document = _DECODER.decode(_decoded(path, 8 * LONGEST))
    except _RepeatedKey as error:
        raise PreflightError(f"data.task: {path}: {error}") from error
    except (ValueError, RecursionError) as error:
        raise PreflightError(
            f"data.task: {path} is no JSON array ({error}), nor has it an object a line: "
            f"jq -c . {path.name} > rows.jsonl"
        ) from error
    if isinstance(document, dict):
        lists = [name for name, value in document.items() if isinstance(value, list)]
        _refuse_object(path, document, [*lists, *document, ""][0])
    return ((n, _object(row)) for n, row in enumerate(document, 1))


def _refuse_wrapped(path: Path, row: Row | str) -> None:
    """PreflightError for a single line that is a document with its rows inside."""
    lists = {n: v for n, v in row.items() if isinstance(v, list)} if isinstance(row, dict) else {}
    for name in sorted(lists, key=lambda name: name not in _WRAPPERS):
        inside = lists[name]
        holds_rows = bool(inside) and isinstance(inside[0], dict) and not {"role", "from"} & {*inside[0]}
        if holds_rows and (name in _WRAPPERS or len(lists) == len(row)):
            _refuse_object(path, row, name)


def _refuse_object(path: Path, document: Any, name: str) -> None:
    raise PreflightError(
        f"data.task: {path} is one object ({', '.join(list(document)[:5])}) and no list of rows: "
        f"jq -c '.{name}[]' {path.name} > rows.jsonl"
    )


class _RepeatedKey(ValueError):
    """An object has a key twice, of which the last would silently win."""


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise _RepeatedKey(f"an object has the key {twice!r} twice: rename one, or leave it out")
    return row


_DECODER = json.JSONDecoder(object_pairs_hook=_pairs)


def _is_json(raw: bytes) -> bool:
    try:
        json.loads(raw)
    except (ValueError, RecursionError):
        return False
    return True


def _line(raw: bytes) -> Row | str:
    try:
        return _object(_DECODER.decode(raw.decode()))
    except UnicodeDecodeError as error:
        return f"not UTF-8 at byte {error.start}"
    except _RepeatedKey as error:
        return str(error)
    except (ValueError, RecursionError) as error:
        return f"not JSON: {error}"


def _object(value: Any) -> Row | str:
    return value if isinstance(value, dict) else f"a {type(value).__name__}, not an object"


def _separated(path: Path, file: io.BufferedReader) -> Lines:
    """Fields of a header, separated by whichever of , ; | and tab is there most often; all are texts.

    As Excel writes them: a first line `sep=;`, and `="007"` for a text of digits.
    """
    csv.field_size_limit(LONGEST)
    text = io.TextIOWrapper(file, "utf-8", newline="")
    try:
        lines = (
            (n, line.lstrip("\ufeff") if n == 1 else line) for n, line in enumerate(_lines(path, text), 1)
        )
        number, header = next(((n, line) for n, line in lines if line.strip("\r\n")), (1, ""))
        named = re.fullmatch(r"\s*\"?sep=(.)\"?\s*", header, re.IGNORECASE)
        if named:
            number, header = next(lines, (number, ""))
        separator = named[1] if named else max(",;\t|", key=header.count)
        yield from _fields(path, number - 1, chain([header], (line for _, line in lines)), separator)
    except UnicodeDecodeError:
        _decoded(path)  # which says where
        raise


def _fields(path: Path, before: int, lines: Iterable[str], separator: str) -> Lines:
    reader = csv.DictReader(lines, delimiter=separator)
    reader.fieldnames = names = [name.strip() for name in reader.fieldnames or ()]
    refuse_repeated(f"{path} line {before + 1}", names)
    try:
        for row in reader:
            if None in row:
                yield before + reader.line_num, f"more than {len(names)} fields"
            else:
                yield before + reader.line_num, {name: _unquoted(value) for name, value in row.items()}
    except csv.Error as error:
        raise PreflightError(f"{path} line {before + reader.line_num}: {error}") from error


def _unquoted(value: str | None) -> str | None:
    if value and value.startswith('="') and value.endswith('"') and len(value) > 2:
        return value[2:-1].replace('""', '"')
    return value
