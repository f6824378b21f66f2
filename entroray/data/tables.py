"""Rows of a table: a file as people have it, a glob or a folder of shards, or a data set of the hub.

What a file is is read from its content first and its suffix second; each row comes with its place.
"""

import ast
import datetime
import glob
import io
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from functools import partial
from itertools import chain, product
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import numpy as np

from entroray.data.text_rows import (
    PACKED,
    SUFFIXES,
    Lines,
    Row,
    content,
    head,
    read_text,
    refuse_repeated,
    refuse_unreadable,
)
from entroray.errors import PreflightError

_APART = re.compile(r"\}\s+\{")
"""What NumPy writes between two messages."""
_BATCH = 1000
"""Rows of a data set of the hub that are objects in memory at once."""


@dataclass(frozen=True)
class Shard:
    """A file, or a data set of the hub; nothing of its rows is read yet."""

    name: str
    """Empty if it is the only one of its table."""
    lines: Callable[[str | None], Lines]
    """Of the answer's column: numbers there have the digits of their own width, 0.1 in four bytes is 0.1."""
    count: int = 0
    """Rows; 0 where nobody knows before they are read."""
    batches: Callable[[int], Iterable[Any]] | None = None
    """Arrow batches of so many rows; None for texts."""
    mapped: bool = False
    """The batches lie in a file already."""


def open_table(source: str, subset: str | None, split: str, revision: str | None = None) -> list[Shard]:
    """A file, those of a glob, or else a data set.

    Raises PreflightError for what cannot be read, ConfigError for a kind of file that is not read at all.
    """
    files = _find_files(source)
    if not files:
        return [_data_set(source, subset, split, revision)]
    return [_open_file(file, f"{file.name} " if len(files) > 1 else "") for file in files]


def read_rows(shards: Iterable[Shard], answer: str | None) -> Iterator[tuple[str, Row | str]]:
    """(place, as in `line 3`; the row or what is wrong with it)."""
    for shard in shards:
        yield from ((f"{shard.name}line {n}", row) for n, row in shard.lines(answer))


def table_name(source: str) -> str:
    """A file's name without its suffixes, wherever it lies; of anything else the source itself."""
    name = Path(source).name
    while Path(name).suffix.lower() in (*SUFFIXES, *PACKED):
        name = Path(name).stem
    return source if name == Path(source).name else name


def lookup(row: Any, path: str) -> Any:
    """What lies at `a.b.0.c` in mappings, lists and texts that hold them; else KeyError.

    A name with dots goes before its parts.
    """
    parts = path.split(".")
    for count in range(len(parts), 0, -1):
        name, rest = ".".join(parts[:count]), ".".join(parts[count:])
        if isinstance(row, Mapping) and name in row:
            return lookup(row[name], rest) if rest else row[name]
    if isinstance(row, list | tuple) and parts[0].removeprefix("-").isdigit():
        place, rest = int(parts[0]), ".".join(parts[1:])
        if -len(row) <= place < len(row):
            return lookup(row[place], rest) if rest else row[place]
    if isinstance(row, str) and (held := unpack(row)) is not None:
        return lookup(held, path)
    raise KeyError(path)


def find(row: Any, path: str) -> Any:
    """`lookup`, with None for nowhere."""
    try:
        return lookup(row, path)
    except KeyError:
        return None


def unpack(text: str) -> Any:
    """The list or mapping that a text holds as JSON, Python or NumPy write it; None where it holds none."""
    ways: tuple[Callable[[str], Any], ...] = (json.loads, ast.literal_eval)
    forms = (text, _APART.sub("}, {", text)) if text.lstrip()[:1] in ("{", "[") else ()
    for read, form in product(ways, dict.fromkeys(forms)):
        try:
            return read(form)
        except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
            continue
    return None


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


def _open_file(path: Path, name: str) -> Shard:
    import pyarrow.parquet as pq

    with content(path) as file:
        packed, begin = not isinstance(file.raw, io.FileIO), head(path, file)
        refuse_unreadable(path, begin)
        if not begin.startswith(b"PAR1"):
            return Shard(name, partial(read_text, path, begin))
        whole = io.BytesIO(file.read()) if packed else path
    try:
        parquet = pq.ParquetFile(whole)
    except (OSError, ValueError) as error:
        raise PreflightError(f"{path} cannot be read as Parquet: {error}") from error
    refuse_repeated(str(path), parquet.schema_arrow.names)
    batches = partial(_parquet, path, whole)
    return Shard(name, partial(_arrow_rows, batches), parquet.metadata.num_rows, batches)


# Columns.


def _parquet(path: Path, whole: Any, size: int) -> Iterator[Any]:
    import pyarrow.parquet as pq

    try:
        yield from pq.ParquetFile(whole, memory_map=True).iter_batches(batch_size=size)
    except (OSError, ValueError) as error:
        raise PreflightError(f"{path} cannot be read as Parquet: {error}") from error


def _data_set(name: str, subset: str | None, split: str, revision: str | None) -> Shard:
    import datasets

    asked = {"revision": revision} if revision else {}
    try:
        data = datasets.load_dataset(name, subset, split=split, **asked)
    except (
        OSError,
        ValueError,
        RuntimeError,
        datasets.exceptions.DatasetsError,
    ) as error:  # offline, no split
        raise PreflightError(
            f"data.task={name} is no file and no data set (subset {subset}, split {split}, revision "
            f"{revision}): {error}"
        ) from error
    tables = lambda size: data.with_format("arrow").iter(batch_size=size)
    batches = lambda size: chain.from_iterable(table.to_batches() for table in tables(size))
    return Shard("", partial(_arrow_rows, tables), getattr(data, "num_rows", 0), batches, mapped=True)


def _arrow_rows(batches: Callable[[int], Iterable[Any]], answer: str | None) -> Lines:
    """Rows of record batches, plain Python; a text that is not UTF-8 spoils its own row alone."""
    before = 0
    for batch in batches(_BATCH):
        yield from enumerate(batch_rows(batch, answer), before + 1)
        before += batch.num_rows


def batch_rows(batch: Any, answer: str | None) -> Iterator[Row | str]:
    """The rows of one batch."""
    kinds = {field.name: field.type for field in batch.schema}
    column = answer if answer in kinds else (answer or "").partition(".")[0]
    narrow = column if "float" in str(kinds.get(column)) else None  # also within structs and lists
    for row in _objects(batch):
        if narrow and isinstance(row, dict):
            row |= {narrow: _shortest(row[narrow], kinds[narrow])}
        yield row


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
