"""Tables of 100,000 rows and more, as Arrow has them: rows stay in a file, a hash of each in memory.

A hash is 64 bits of a value, 8 bytes of a text at a time: the same in every run and on every machine.
"""

import ctypes
import mmap
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from entroray.data.tables import find
from entroray.errors import writing
from entroray.home import home_folder

LARGE = 100_000
"""Rows from which a table is kept so."""
BATCH = 1 << 16
"""Rows taken in at once."""
AHEAD = 2
"""Batches that may wait for their hashes while the next is read."""
Hashes = NDArray[np.uint64]
T = TypeVar("T")
_ODD, _HALF = np.uint64(0x9E3779B97F4A7C15), np.uint64(32)


def keep_batches(
    streams: Iterable[Iterable[Any]], see: Callable[[Any], T], *, mapped: bool = False
) -> tuple[list[Any], list[T], Callable[[], None]]:
    """Record batches mapped from a file that goes with the process, and what lets go of pages read so far.

    A stream has one schema. Between them is what `see` finds in each batch, beside the writing. What is
    `mapped` already is not written. InfrastructureError if the disk is full.
    """
    import pyarrow as pa

    kept, starts, forget = list[Any](), list[int](), lambda: None
    seen: list[Future[T]] = []
    with ThreadPoolExecutor(AHEAD) as beside, _nameless_file() as (file, room):
        for stream in streams:
            starts.append(file.tell())
            sink = None
            for batch in stream:
                seen.append(beside.submit(see, batch))
                if len(seen) > AHEAD:
                    seen[-AHEAD - 1].result()  # deadline: it computes
                if mapped:
                    kept.append(batch)
                    continue
                with writing(*room):
                    sink = sink or pa.ipc.new_stream(file, batch.schema)
                    sink.write_batch(batch)
            if sink is None:
                starts.pop()
                continue
            with writing(*room):
                sink.close()
                file.flush()
        if starts:
            pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            forget, buffer = partial(pages.madvise, mmap.MADV_DONTNEED), pa.py_buffer(pages)
            kept = [batch for start in starts for batch in pa.ipc.open_stream(buffer.slice(start))]
    return kept, [each.result() for each in seen], forget  # deadline: they have computed


def release_memory() -> None:
    """Give back to the system what Arrow and glibc keep of memory that is free."""
    import pyarrow as pa

    pa.default_memory_pool().release_unused()
    with suppress(AttributeError, OSError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


@contextmanager
def _nameless_file() -> Iterator[tuple[Any, tuple[Path, str]]]:
    """A file in the cache folder, and what `writing` is to say of a full disk."""
    named = os.environ.get("ENTRORAY_CACHE")
    folder = Path(named).expanduser() if named else home_folder() / ".cache" / "entroray"
    room = folder, "free some space there, or set ENTRORAY_CACHE to a folder on a larger disk"
    with writing(*room):
        folder.mkdir(parents=True, exist_ok=True)
        file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  # closed below
    with file:
        yield file, room


# Columns.


def find_column(column: Any, path: str) -> Any | None:
    """The array at `a.b.0.c` of an array of structs, as `tables.lookup` finds it in one; None: nowhere."""
    import pyarrow as pa
    import pyarrow.compute as pc

    kind, parts = column.type, path.split(".")
    names = [field.name for field in kind] if pa.types.is_struct(kind) else []
    for count in range(len(parts), 0, -1):
        name, rest = ".".join(parts[:count]), ".".join(parts[count:])
        if name in names:
            inner = pc.struct_field(column, [names.index(name)])
            return find_column(inner, rest) if rest else inner
    if _is_text(kind):
        return _find_in_texts(column, path)
    if not _is_list(kind) or not parts[0].removeprefix("-").isdigit():
        return None
    place, rest = int(parts[0]), ".".join(parts[1:])
    values, starts, counts = _lists(column)
    within = (-counts <= place) & (place < counts)
    chosen = np.where(within, starts + place + (counts if place < 0 else 0), 0)
    inner = values.take(pa.array(chosen, mask=~within))
    return find_column(inner, rest) if rest else inner


def _find_in_texts(column: Any, path: str) -> Any | None:
    """As `find_column` in a column of texts that hold lists or mappings: what is there, as a text."""
    import pyarrow as pa

    texts = (text and text.decode(errors="replace") for text in column.cast(pa.large_binary()).to_pylist())
    found = [find(text, path) for text in texts]
    if all(value is None for value in found):
        return None
    plain = [x if isinstance(x, str) else "" if x in (None, [], {}) else repr(x) for x in found]
    return pa.array(plain, pa.large_string())


def find_blank(column: Any, *, numbers: bool) -> NDArray[np.bool_] | bool:
    """[rows] whether there is nothing in a column of texts or lists, or of `numbers` and dates; True: never.

    Nulls, empty texts and lists, white space, numbers that are not finite, texts that are not UTF-8.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    kind = getattr(column, "type", None)
    if kind is None or pa.types.is_struct(kind) or pa.types.is_map(kind) or _is_bytes(kind):
        return True
    if pa.types.is_dictionary(kind):
        return find_blank(column.dictionary_decode(), numbers=numbers)
    if _is_list(kind):
        wrong = pc.equal(pc.list_value_length(column), 0)
    elif _is_text(kind):
        try:
            column.validate(full=True)
        except ValueError:
            return np.array([_is_blank(text) for text in column.cast(pa.large_binary()).to_pylist()])
        column = column.cast(pa.large_string())
        wrong = pc.or_(pc.equal(pc.binary_length(column), 0), pc.utf8_is_space(column))
    elif not numbers:
        return True
    else:
        wrong = pc.invert(pc.is_finite(column)) if pa.types.is_floating(kind) else pc.is_null(column)
    return pc.fill_null(wrong, True).to_numpy(zero_copy_only=False)


def strip_before(column: Any, marker: str) -> Any:
    """Texts without what stands before their last `marker`; anything else as it is."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if not marker or not _is_text(column.type) or not pc.any(pc.match_substring(column, marker)).as_py():
        return column
    before = "(?s)^.*" + "".join(f"\\x{{{ord(letter):x}}}" for letter in marker)
    return pc.utf8_trim_whitespace(pc.replace_substring_regex(column, pattern=before, replacement=""))


def _is_blank(text: bytes | None) -> bool:
    try:
        return not (text or b"").decode().strip()
    except UnicodeDecodeError:
        return True


def _is_text(kind: Any) -> bool:
    import pyarrow as pa

    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _is_bytes(kind: Any) -> bool:
    return "binary" in str(kind)


def _is_list(kind: Any) -> bool:
    return "list" in str(kind).partition("<")[0]


def _lists(column: Any) -> tuple[Any, NDArray[np.int64], NDArray[np.int64]]:
    """What is in lists, one after the other; where each begins there; how many it has."""
    import pyarrow.compute as pc

    counts = pc.fill_null(pc.list_value_length(column), 0).to_numpy(zero_copy_only=False).astype(np.int64)
    return column.flatten(), np.cumsum(counts) - counts, counts


# Hashes.


def hash_column(column: Any) -> Hashes:
    """[rows] of an array; of lists and structs by what is in them, of all else as it is written."""
    import pyarrow as pa

    kind = column.type
    if pa.types.is_dictionary(kind):
        return hash_column(column.dictionary_decode())
    if pa.types.is_struct(kind):
        found = np.zeros(len(column), np.uint64)
        for inner in column.flatten():
            found = mix(found ^ hash_column(inner))
        return found
    if _is_list(kind):
        values, starts, counts = _lists(column)
        return _fold(mix(counts.astype(np.uint64)), hash_column(values), starts, counts, step=1)
    if not _is_text(kind) and not _is_bytes(kind):
        try:
            column = column.cast(pa.large_string())
        except (ValueError, NotImplementedError):  # maps, and what no text is made of
            column = pa.array(map(repr, column.to_pylist()), pa.large_string())
    return _hash_texts(column.cast(pa.large_binary()))


def mix(words: Hashes) -> Hashes:
    """Each word with its bits spread, one to one."""
    words = words * _ODD
    return words ^ (words >> _HALF)


def _hash_texts(column: Any) -> Hashes:
    _, offsets, data = column.buffers()
    ends = np.frombuffer(offsets, np.int64)[column.offset : column.offset + len(column) + 1]
    first, last = int(ends[0]), int(ends[-1])
    padded = np.zeros(last - first + 16, np.uint8)  # 8 bytes before the first text and after the last
    padded[8:-8] = np.frombuffer(data, np.uint8)[first:last] if last > first else 0
    words = np.ndarray(len(padded) - 7, "V8", padded, strides=(1,))  # the 8 bytes from each byte on
    starts, lengths = ends[:-1] - first + 8, np.diff(ends)
    found = _fold(mix(lengths.astype(np.uint64)), words, starts, lengths // 8, step=8)
    rest = (63 - 8 * (lengths % 8)).astype(np.uint64)
    return mix(found ^ (words[starts + lengths - 8].view(np.uint64) >> np.uint64(1) >> rest))


def _fold(found: Hashes, words: Any, starts: Any, counts: Any, *, step: int) -> Hashes:
    """Row by row `counts` words, from `starts` on every `step`; the longest rows first, all in place."""
    most = int(counts.max(initial=0))
    if not most:
        return found
    order = np.argsort((most - counts).astype(np.uint16 if most < 1 << 16 else np.int64), kind="stable")
    longer = len(counts) - np.cumsum(np.bincount(counts, minlength=1))
    sorted_hashes, at = found[order], starts[order]
    for rows in longer[:-1]:
        head = sorted_hashes[:rows]
        head ^= words[at[:rows]].view(np.uint64)
        head *= _ODD
        head ^= head >> _HALF
        at[:rows] += step
    found[order] = sorted_hashes
    return found


# Which rows stay.


def first_of_each(keys: Hashes, answers: Hashes) -> tuple[NDArray[np.int64], int]:
    """The first row of each key, in order of rows, and how many others have another answer than it has."""
    ordered = np.sort(keys)
    if not len(keys) or not (ordered[1:] == ordered[:-1]).any():
        return np.arange(len(keys)), 0
    del ordered
    order = np.argsort(keys, kind="stable")
    new = np.r_[True, keys[order[1:]] != keys[order[:-1]]]
    of_first = answers[order[new]][np.cumsum(new) - 1]
    return np.sort(order[new]), int((answers[order] != of_first).sum())
